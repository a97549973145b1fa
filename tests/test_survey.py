"""A survey of a model: resumed, shared out and merged, saved and read again; what cannot be measured is said."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from looped import recurrent
from restpoint import bundled
from restpoint.errors import RestpointError
from restpoint.model.load import Loaded, load
from restpoint.profile import Profile
from restpoint.trajectory.atlas import Atlas
from restpoint.trajectory.comparison import compare
from restpoint.trajectory.lens import FittedLens
from restpoint.trajectory.measure import Trajectory
from restpoint.trajectory.options import SurveyOptions
from restpoint.trajectory.reading import Piece, Reader, Sample
from restpoint.trajectory.survey import merge, survey
from restpoint.trajectory.surveyed import Surveyed, untrained_twin

ALL = SurveyOptions(max_tokens=1500, sequence_length=64, batch=4, scenes=3, checkpoint_every=2)
OPTIONS = replace(ALL, measures=("geometry", "pairs", "lens", "saturation", "sinks", "transport"))


def samples() -> Iterator[Sample]:
    return (Sample(text, domain) for domain, text in bundled.documents())


@pytest.fixture(scope="module")
def subject(reference: Loaded) -> Surveyed:
    return Surveyed(reference.name, reference.model, reference.tokenizer)


@pytest.fixture(scope="module")
def whole(subject: Surveyed) -> Atlas:
    return survey(subject, samples(), OPTIONS)


def same(one: Atlas, other: Atlas, tolerance: float = 1e-10) -> None:
    assert one.results.keys() == other.results.keys()
    for measure, results in one.results.items():
        assert results.keys() == other.results[measure].keys()
        for name, value in results.items():
            np.testing.assert_allclose(
                value, other.results[measure][name], rtol=tolerance, atol=tolerance, err_msg=f"{measure}.{name}"
            )


def test_predictors_of_a_profile_are_lenses(reference: Loaded, subject: Surveyed, tmp_path: Path) -> None:
    lenses = Profile.load(bundled.PROFILE_PATH).lenses()
    assert "logit" not in lenses
    options = replace(OPTIONS, max_tokens=4000, measures=("lens",))
    found = survey(subject, samples(), options, lenses=lenses).results["lens"]
    for name, lens in lenses.items():
        assert found[f"{name}.tv"].isfinite().nonzero().flatten().tolist() == sorted(lens.predictors), name
    assert found["ridge.tv"][4] < found["logit.tv"][4] - 0.1
    assert found["ridge.agreement"][4] > found["logit.agreement"][4] + 0.1

    other = {"ridge": FittedLens({4: lenses["recurrence"].predictors[4]})}
    survey(subject, samples(), options, lenses={"ridge": lenses["ridge"]}, folder=tmp_path)
    with pytest.raises(RestpointError, match="another model or with other options"):
        survey(subject, samples(), options, lenses=other, folder=tmp_path)
    looped = Surveyed("looped", recurrent(dtype=torch.float32, vocab_size=8192), reference.tokenizer)
    with pytest.raises(RestpointError, match="lenses: predictors count the layers of a whole decoder"):
        survey(looped, samples(), options, lenses=other)


def test_an_atlas_holds_what_was_asked_for(whole: Atlas, subject: Surveyed) -> None:
    assert (whole.subject.layers, whole.subject.hidden, whole.subject.vocabulary) == (16, 256, 8192)
    assert 1499 <= whole.corpus["tokens"] <= 1500
    assert sum(whole.corpus["domains"].values()) == whole.corpus["tokens"]
    assert len(whole.scenes) == 3
    assert len({scene.domain for scene in whole.scenes}) == 3
    assert whole.results["geometry"]["norm.mean"].shape == (17,)
    assert not whole.sums
    for measure, results in whole.results.items():
        assert whole.papers[measure]
        assert all(value.dtype == torch.float64 for value in results.values()), measure
    for scene in whole.scenes:
        assert scene.plane.shape == (17, len(scene.tokens), 3)
        for token, settled in enumerate(scene.settled.tolist()):
            column = [scene.predicted[layer][token] for layer in range(17)]
            assert len(set(column[settled:])) == 1
            assert settled == 0 or column[settled - 1] != column[-1] or settled == 16


def test_an_interrupted_survey_goes_on(subject: Surveyed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = replace(OPTIONS, measures=("geometry", "pairs", "lens", "saturation"), scenes=0)
    whole = survey(subject, samples(), options)

    class Stopped(Exception):
        pass

    def stop_at(stage: str, done: int, total: int) -> None:
        assert stage == "read"
        assert total == 1500
        if done > 900:
            raise Stopped

    with pytest.raises(Stopped):
        survey(subject, samples(), options, folder=tmp_path, progress=stop_at)
    assert (tmp_path / "partial.safetensors").exists()
    read, seen = Reader.read, []

    def watched(self: Reader, pieces: Sequence[Piece]) -> list[Trajectory]:
        seen.extend(piece.number for piece in pieces)
        return read(self, pieces)

    monkeypatch.setattr(Reader, "read", watched)
    again = survey(subject, samples(), options, folder=tmp_path)
    assert seen == list(range(seen[0], whole.corpus["texts"]))
    assert seen[0] > 0
    same(again, whole)
    assert again.corpus == whole.corpus
    seen.clear()
    same(survey(subject, samples(), options, folder=tmp_path), whole)
    assert not seen, "what is measured, and not saved yet, is not measured again"
    again.save(tmp_path)
    assert not (tmp_path / "partial.safetensors").exists()


def test_an_unfinished_survey_of_something_else_is_refused(subject: Surveyed, tmp_path: Path) -> None:
    def stop(_stage: str, done: int, _total: int) -> None:
        if done > 900:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        survey(subject, samples(), OPTIONS, folder=tmp_path, progress=stop)
    with pytest.raises(RestpointError, match=r"^output: .*another model or with other options"):
        survey(subject, samples(), replace(OPTIONS, top=3), folder=tmp_path)
    rest = itertools.islice(samples(), 1, None)
    with pytest.raises(RestpointError, match=r"^text: .*unfinished survey of another text"):
        survey(subject, rest, OPTIONS, folder=tmp_path)
    with pytest.raises(RestpointError, match=r"^text: .*unfinished survey of another text"):
        survey(subject, [Sample("Too short a text.")], OPTIONS, folder=tmp_path)
    with pytest.raises(RestpointError, match=r"^output: "):
        survey(untrained_twin(subject), samples(), OPTIONS, folder=tmp_path)


def test_shares_merge_to_the_whole(subject: Surveyed, whole: Atlas, tmp_path: Path) -> None:
    shares = []
    for number in (1, 2, 3):
        survey(subject, samples(), replace(OPTIONS, share=f"{number}/3")).save(tmp_path / str(number))
        shares.append(Atlas.load(tmp_path / str(number)))
    merged = merge([shares[2], shares[0], shares[1]])
    same(merged, whole)
    assert merged.corpus == whole.corpus
    with pytest.raises(RestpointError, match="of 3 shares there are 1/3, 2/3; give each of them once"):
        merge(shares[:2])
    with pytest.raises(RestpointError, match="give each of them once"):
        merge([*shares, shares[0]])
    with pytest.raises(RestpointError, match="of 1 shares there are none"):
        merge([whole])


def test_shares_of_different_surveys_do_not_merge(subject: Surveyed) -> None:
    one = survey(subject, samples(), replace(OPTIONS, share="1/2", measures=("geometry",)))
    other = survey(subject, samples(), replace(OPTIONS, share="2/2", measures=("geometry",), sequence_length=32))
    with pytest.raises(RestpointError, match="differ in their text"):
        merge([one, other])
    twin = survey(untrained_twin(subject), samples(), replace(OPTIONS, share="2/2", measures=("geometry",)))
    with pytest.raises(RestpointError, match="differ in their model"):
        merge([one, twin])


def test_an_atlas_is_read_as_it_was_written(whole: Atlas, tmp_path: Path) -> None:
    whole.save(tmp_path)
    again = Atlas.load(tmp_path)
    same(again, whole, 0.0)
    assert again.subject == whole.subject
    assert again.corpus == whole.corpus
    assert again.conditions == json.loads(json.dumps(whole.conditions))
    for one, other in zip(again.scenes, whole.scenes, strict=True):
        assert (one.text, one.tokens, one.predicted) == (other.text, other.tokens, other.predicted)
        torch.testing.assert_close(one.plane, other.plane)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda folder: (folder / "atlas.json").unlink(), "holds none"),
        (lambda folder: (folder / "atlas.json").write_text("{"), "is damaged"),
        (lambda folder: (folder / "atlas.safetensors").write_bytes(b"x"), "is damaged"),
        (lambda folder: rewrite(folder, format=99), "format 99, of a newer restpoint"),
        (lambda folder: rewrite(folder, tensors="0"), "files of two different atlases"),
    ],
)
def test_an_atlas_that_cannot_be_read_says_why(whole: Atlas, tmp_path: Path, change, told: str) -> None:
    whole.save(tmp_path)
    change(tmp_path)
    with pytest.raises(RestpointError, match=f"^atlas: .*{told}"):
        Atlas.load(tmp_path)


def rewrite(folder: Path, **fields: Any) -> None:
    path = folder / "atlas.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_an_untrained_twin_differs_as_theory_says(subject: Surveyed, whole: Atlas) -> None:
    """The same shape and text; random layers hardly move a token towards what is predicted at the end."""
    twin = survey(untrained_twin(subject), samples(), OPTIONS)
    assert twin.subject.untrained
    assert twin.subject.layers == whole.subject.layers
    assert twin.subject.fingerprint != whole.subject.fingerprint
    assert twin.corpus["hash"] == whole.corpus["hash"]
    assert twin.results["lens"]["logit.kl"][1] < 0.1 * whole.results["lens"]["logit.kl"][1]
    again = untrained_twin(subject).model
    for one, other in zip(again.parameters(), untrained_twin(subject).model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_encoder_is_surveyed_without_what_needs_a_head(reference: Loaded) -> None:
    config = hf.BertConfig(
        vocab_size=8192, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48
    )
    encoder = Surveyed("bert", hf.BertModel(config).eval(), reference.tokenizer)
    atlas = survey(encoder, samples(), ALL)
    assert {"geometry", "pairs"} <= set(atlas.results)
    assert not {"lens", "saturation", "bounds"} & set(atlas.results)
    assert any(note.startswith("lens is left out") for note in atlas.conditions["notes"])
    assert atlas.scenes[0].predicted == []
    with pytest.raises(RestpointError, match=r"measures: lens cannot be measured .*no causal LM"):
        survey(encoder, samples(), replace(OPTIONS, measures=("lens",)))


def test_images_are_surveyed_without_a_tokenizer() -> None:
    config = hf.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
    )
    generator = torch.Generator().manual_seed(0)
    images = [Sample({"pixel_values": torch.randn(1, 3, 32, 32, generator=generator)}, "noise") for _ in range(6)]
    atlas = survey(Surveyed("vit", hf.ViTModel(config).eval()), images, ALL)
    assert atlas.corpus["texts"] == 6
    assert atlas.results["geometry"]["step.mean"].shape == (3,)
    assert not atlas.scenes


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"measures": ("geometri",)}, "measures: 'geometri' is unknown; choose from geometry"),
        ({"max_tokens": 1}, "max_tokens is 1"),
        ({"sequence_length": 1}, "sequence_length is 1; a trajectory needs two tokens"),
        ({"share": "3/2"}, "share is '3/2'; write it as 1/4"),
        ({"share": "half"}, "share is 'half'"),
        ({"batch": 0}, "batch is 0"),
        ({"scenes": -1}, "scenes is -1"),
    ],
)
def test_options_that_make_no_sense_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(RestpointError, match=told):
        SurveyOptions(**fields)


def test_nothing_to_read_is_said(subject: Surveyed) -> None:
    with pytest.raises(RestpointError, match=r"^text: there is nothing in it to read"):
        survey(subject, [Sample(""), Sample(" ")], OPTIONS)


def test_atlases_of_unlike_depth_are_compared_at_equal_shares_of_it(whole: Atlas, reference: Loaded) -> None:
    config = hf.BertConfig(
        vocab_size=8192, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48
    )
    other = survey(Surveyed("bert", hf.BertModel(config).eval(), reference.tokenizer), samples(), ALL)
    found = compare(whole, other)
    assert found.layers == (16, 4)
    assert any("depths differ (16 and 4 layers)" in note for note in found.notes)
    profiles = {profile.name: profile for profile in found.profiles}
    anisotropy = profiles["geometry.anisotropy"]
    np.testing.assert_allclose(anisotropy.first, whole.results["geometry"]["anisotropy"][::4])
    np.testing.assert_allclose(anisotropy.second, other.results["geometry"]["anisotropy"])
    assert all(profile.distance == 0 for profile in compare(whole, whole).profiles)
    with pytest.raises(RestpointError, match=r"^atlases: they have measured nothing in common"):
        compare(whole, replace(other, results={}))


def test_an_encoder_that_lacks_weights_is_refused(reference: Loaded, tmp_path: Path) -> None:
    """Weights that a checkpoint lacks would be random ones."""
    config = hf.BertConfig(
        vocab_size=8192, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = hf.BertModel(config)
    reference.tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    kept = {name: own for name, own in load_file(weights).items() if "pooler" not in name}
    save_file(kept, weights, {"format": "pt"})
    assert type(load(str(tmp_path), causal=False).model) is hf.BertModel
    kept = {name: own.clone() for name, own in kept.items() if name != "encoder.layer.1.output.dense.weight"}
    save_file(kept, weights, {"format": "pt"})
    with pytest.raises(RestpointError, match=r"lacks 1 weights of its layers \(encoder.layer.1.output.dense.weight"):
        load(str(tmp_path), causal=False)
