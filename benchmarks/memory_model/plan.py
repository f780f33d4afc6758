"""The cases that the suite measures and computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

from neuroada_kernels.benchmarks.memory_model.measure import measure
from neuroada_kernels.benchmarks.memory_model.methods import method, table
from neuroada_kernels.benchmarks.memory_model.predict import predict, predict_layer
from neuroada_kernels.benchmarks.memory_model.shapes import MODELS, Setting, Sizes
from neuroada_kernels.benchmarks.records import Row

#: Scaled models: Llamas dominated by layers, by the head and by large linears; an encoder.
SCALED = {
    "Llama, 3 layers": Sizes(256, 704, 3, 8, 192, 4),
    "Llama, large vocabulary": Sizes(128, 320, 2, 4, 8000, 4),
    "Llama, few tokens": Sizes(512, 1376, 2, 8, 256, 8),
    "encoder, 3 layers": Sizes(256, 1024, 3, 8, 512),
}
LAYERS, HEAD, WIDE, ENCODER = SCALED

#: Model of ``SCALED`` or ``MODELS``, batch, sequence, dtype, k, checkpointing, method.
QUICK = [
    (LAYERS, 3, 100, "float32", 1, False, "neuroada"),
    (LAYERS, 3, 100, "float32", 1, False, "neuroada-full"),
    (LAYERS, 3, 100, "float32", 1, False, "neuroada-compact"),
    (LAYERS, 3, 100, "bfloat16", 20, False, "neuroada-resident"),
    (LAYERS, 3, 100, "float32", 4, True, "neuroada"),
    (LAYERS, 3, 100, "bfloat16", 4, True, "neuroada-compact"),
    (LAYERS, 3, 100, "float32", 4, False, "materialised"),
    (LAYERS, 1, 128, "bfloat16", 4, True, "materialised"),
    (LAYERS, 3, 100, "float32", 4, False, "masked-dense"),
    (WIDE, 1, 32, "float32", 20, True, "masked-dense"),
    (LAYERS, 3, 100, "float32", 1, False, "lora-r16"),
    (LAYERS, 3, 100, "float32", 1, False, "dora-r16"),
    (LAYERS, 3, 100, "float32", 1, False, "ia3"),
    (LAYERS, 3, 100, "float32", 1, False, "shira-r16"),
    (WIDE, 1, 32, "float32", 1, False, "full"),
    (HEAD, 2, 64, "float32", 8, False, "neuroada"),
    (HEAD, 2, 64, "bfloat16", 8, True, "lora-r64"),
    (ENCODER, 2, 64, "float32", 4, False, "neuroada"),
    (ENCODER, 2, 64, "bfloat16", 4, True, "lora-r8"),
    (ENCODER, 1, 64, "bfloat16", 4, True, "frozen"),
]
FULL = [
    *QUICK,
    (LAYERS, 3, 100, "float32", 1, False, "frozen"),
    (LAYERS, 3, 100, "bfloat16", 4, False, "neuroada"),
    (LAYERS, 3, 100, "bfloat16", 4, False, "masked-dense"),
    (LAYERS, 3, 100, "bfloat16", 4, True, "masked-dense"),
    (LAYERS, 3, 100, "bfloat16", 4, True, "materialised"),
    (LAYERS, 3, 100, "float32", 1, True, "lora-r16"),
    (WIDE, 1, 32, "float32", 20, False, "neuroada-resident"),
    (ENCODER, 2, 64, "float32", 1, False, "neuroada"),
    (WIDE, 1, 32, "bfloat16", 1, True, "full"),
    (HEAD, 2, 64, "float32", 1, True, "shira-r16"),
    (ENCODER, 2, 64, "float32", 1, False, "masked-dense"),
    (ENCODER, 2, 64, "float32", 1, True, "full"),
    (ENCODER, 1, 64, "float32", 4, False, "frozen"),
    (LAYERS, 1, 64, "bfloat16", 4, True, "dora-r16"),
    (ENCODER, 2, 256, "float32", 4, True, "dora-r16"),
    (LAYERS, 1, 1024, "float32", 4, True, "shira-r16"),
    ("RoBERTa-large", 1, 128, "float32", 20, False, "neuroada"),
    ("RoBERTa-large", 1, 128, "float32", 20, True, "neuroada"),
    ("RoBERTa-large", 1, 128, "float32", 20, False, "lora-r16"),
]

#: Methods for which real models are computed.
MODEL_METHODS = tuple(table(1))
MODEL_TOKENS = {"RoBERTa-large": (32, 128)}
TOKENS = (1, 2048)  # batch and sequence of the others


@dataclass(frozen=True)
class Work:
    """A row's key, and the function that computes the row."""

    key: str
    row: Callable[[], Row]


def validations(quick: bool) -> Iterator[Work]:
    """Measurements, each with the prediction of the analytical model."""
    for name, batch, sequence, dtype, k, checkpointing, of in QUICK if quick else FULL:
        sizes = (SCALED | MODELS)[name]
        setting = Setting(sizes, batch, sequence, dtype, k, checkpointing)
        yield Work(_key("validation", name, setting, of), _Validation(name, setting, of))


def model_work() -> Iterator[Work]:
    """Every method on every real model, k of 1 and 20, with and without checkpointing."""
    for name, sizes in MODELS.items():
        batch, sequence = MODEL_TOKENS.get(name, TOKENS)
        for k in (1, 20):
            for checkpointing in (False, True):
                setting = Setting(sizes, batch, sequence, "bfloat16", k, checkpointing)
                for of in MODEL_METHODS:
                    yield Work(_key("models", name, setting, of), _Model(name, setting, of))


def _key(part: str, name: str, setting: Setting, of: str) -> str:
    checkpointing = "checkpointed" if setting.checkpointing else "plain"
    way = f"{setting.tokens} tokens, {setting.dtype}, k {setting.k}, {checkpointing}"
    return f"{part}, {name}, {way}, {of}"


@dataclass(frozen=True)
class _Model:
    name: str
    setting: Setting
    method: str

    part = "models"

    def __call__(self) -> Row:
        of = method(self.method, self.setting.k)
        return self._row() | {
            "predicted": predict(self.setting, of).as_dict(),
            "layer": predict_layer(self.setting, of),
        }

    def _row(self) -> dict[str, Any]:
        return {
            "part": self.part,
            "model": self.name,
            "setting": asdict(self.setting),
            "method": self.method,
        }


class _Validation(_Model):
    part = "validation"

    def __call__(self) -> Row:
        of = method(self.method, self.setting.k)
        if of.needs is not None and find_spec(of.needs) is None:
            return self._row() | {"skipped": f"{of.needs} is not installed"}
        measured = measure(self.setting, of).as_dict()
        predicted = predict(self.setting, of).as_dict()
        names = ("peak", "step_peak", "kept")
        return self._row() | {
            "measured": measured,
            "predicted": predicted,
            "error": {name: predicted[name] / measured[name] - 1 for name in names},
        }
