// A click on a column's name sorts its table: by the first number in a cell where most have one, else by the text.
document.querySelectorAll("table.sortable").forEach((table) => {
  const body = table.tBodies[0];
  if (!body || body.rows.length < 2) return;
  const original = Array.from(body.rows);
  const number = (text) => {
    const found = text.replace(/−/g, "-").replace(/(\d),(?=\d{3})/g, "$1").match(/[-+]?\d+(\.\d+)?(e[-+]?\d+)?/i);
    return found ? parseFloat(found[0]) : null;
  };
  Array.from(table.tHead.rows[0].cells).forEach((head, column) => {
    const label = head.textContent.trim();
    if (!label) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      const next = { descending: "ascending", ascending: null }[before];
      const wanted = before ? next : "descending";
      table.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
      const rows = original.slice();
      if (wanted) {
        head.setAttribute("aria-sort", wanted);
        const texts = new Map(rows.map((row) => [row, row.cells[column].textContent.trim()]));
        const numbers = new Map(rows.map((row) => [row, number(texts.get(row))]));
        const numeric = rows.filter((row) => numbers.get(row) !== null).length * 2 > rows.length;
        const sign = wanted === "ascending" ? 1 : -1;
        rows.sort((a, b) => {
          if (!numeric) return sign * texts.get(a).localeCompare(texts.get(b));
          const [x, y] = [numbers.get(a), numbers.get(b)];
          // what has no number comes last, whichever way
          if (x === null || y === null) return (x === null) - (y === null);
          return sign * (x - y);
        });
      }
      body.append(...rows);
    });
  });
});
