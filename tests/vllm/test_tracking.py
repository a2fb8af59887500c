"""A model of which something was not loaded is refused."""

from __future__ import annotations

import pytest
import torch

from streamload.errors import MismatchError
from streamload.vllm.tracking import check_loaded


class UnquantizedLinearMethod:
    """Called as vLLM's is, by whose name it is known."""

    def process_weights_after_loading(self) -> None:
        """As all methods of vLLM's have it."""


class Fp8LinearMethod(UnquantizedLinearMethod):
    """A quantized layer's."""


def model() -> torch.nn.Module:
    """Two layers, one of them quantized, and a norm."""
    found = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2, bias=False), "q": torch.nn.Linear(2, 2, bias=False)})
    found["norm"] = torch.nn.LayerNorm(2, bias=False)
    found["a"].quant_method = UnquantizedLinearMethod()  # type: ignore[assignment]
    found["q"].quant_method = Fp8LinearMethod()  # type: ignore[assignment]
    return found


@pytest.mark.parametrize(
    ("loaded", "quantized", "draft", "missing"),
    [
        ({"a.weight", "norm.weight"}, False, False, ()),
        ({"norm.weight"}, False, False, ("a.weight",)),
        (set(), False, False, ("a.weight", "norm.weight")),
        ({"norm.weight"}, False, True, ()),
        ({"norm.weight"}, True, False, ()),
        ({"a.weight"}, True, False, ("norm.weight",)),
    ],
)
def test_what_was_not_loaded(loaded: set[str], quantized: bool, draft: bool, missing: tuple[str, ...]) -> None:
    if not missing:
        check_loaded(model(), loaded, uri="s3://m", quantized=quantized, draft=draft)
        return
    with pytest.raises(MismatchError, match=f"^s3://m: the checkpoint has nothing for {len(missing)} of") as raised:
        check_loaded(model(), loaded, uri="s3://m", quantized=quantized, draft=draft)
    assert raised.value.missing == missing
