"""Every member of the zoo is exact or refused by name, and which is which does not change unnoticed."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import regate_patch
from model_adapters import find_adapter
from tests.oracle import random_active
from tests.zoo import of_any_release, releases
from tests.zoo.examine import alone, cast, difference, examine, run

_ENCODER_DECODER = "is an encoder-decoder"
_NO_LABELS = "takes no labels"
REFUSED = {
    "florence2": _ENCODER_DECODER,
    "pix2struct": _ENCODER_DECODER,
    "pp_formulanet": _ENCODER_DECODER,
    "t5gemma2": _ENCODER_DECODER,
    "udop": _ENCODER_DECODER,
    "vision-encoder-decoder": _ENCODER_DECODER,
    "diffusion_gemma": _NO_LABELS,
    "pi0": _NO_LABELS,
    "glm5_next": "picks positions by number",
    "hy_v4_vl": "chooses among positions by a mask that is read in an unknown way",
    "evolla": "Data-dependent branching",
    "minimax_m3_vl": "picks positions by number",
    "qwen4_exp": "data-dependent expression",
}

# One of each kind, and the refusals that cost nothing; the others run by `make zoo`.
IN_EVERY_RUN = {
    "ernie4_5_vl_moe", "gemma3n", "git", "granite4_vision", "idefics", "lfm2_vl", "llama4", "minimax_m3_vl",
    "mistral_large4", "mllama", "nemotron_h_omni", "florence2", "udop", "pi0", "diffusion_gemma",
}  # fmt: skip

MEMBERS = of_any_release()


def _case(name: str) -> Any:
    return releases.case(name, *([] if name in IN_EVERY_RUN else [pytest.mark.zoo]))


CASES = [_case(name) for name in MEMBERS]


def test_no_type_is_missing() -> None:
    assert MEMBERS.keys() >= set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def test_a_type_is_left_out_by_the_release_it_came_with() -> None:
    for name in releases.SINCE:
        assert (name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) == releases.exists(name), name
    assert releases.SINCE.keys() <= MEMBERS.keys()
    assert {name for name, _ in releases.BROKEN | releases.REFUSED} <= MEMBERS.keys()


@pytest.mark.few(2)
@pytest.mark.parametrize("name", CASES)
def test_exact_or_refused(name: str) -> None:
    findings = examine(name, MEMBERS[name])
    if name in REFUSED:
        assert REFUSED[name] in findings.refused
    else:
        assert findings.exact, findings
        assert findings.attention + findings.mlp >= 2
        assert findings.graphs == 1


def test_a_type_that_is_left_out_for_this_release_does_fail_with_it() -> None:
    """A reason that no longer holds would hide the type."""
    for name, release in releases.BROKEN | releases.REFUSED:
        if release in releases.installed():
            try:
                findings = examine(name, MEMBERS[name])
            except Exception:  # broken, with or without a gate
                assert releases.broken(name), name
            else:
                assert findings.refused, name


@pytest.mark.zoo
@pytest.mark.skipif(not releases.exists("nemotron_h_omni"), reason=str(releases.why_not("nemotron_h_omni")))
def test_lengths_of_whole_chunks() -> None:
    """Captured where a chunked recurrence has nothing to pad, run where K is no whole number of chunks."""
    specimen = MEMBERS["nemotron_h_omni"]
    model = specimen.double()
    decoder = find_adapter(model).decoder(model)
    handle = regate_patch.patch(decoder, backend="eager")
    for length in (24, 40, 43):  # chunks of 8
        other = specimen.batch("none", answer=9)["input_ids"].shape[1] - 9
        batch = cast(specimen.batch("none", answer=length - other), specimen)
        active = random_active(batch)
        expected = alone(model, decoder, list(zip(specimen.split(batch, 2), active, strict=True)))
        with regate_patch.active(active):
            got = run(model, decoder, [(batch, active)])
        assert difference(got, expected) < 1e-5
        assert len(handle.statistics.graphs) == (1 if length < 43 else 2)
    handle.remove()
