"""The folder of a batch job: what is there as a whole, and what is refused."""

from __future__ import annotations

import json

import pytest

from simsd import SimsdError

pa = pytest.importorskip("pyarrow")
pytest.importorskip("ray")

from simsd.ray.output import Output, fingerprint  # noqa: E402

PART = pa.table({"id": ["a", "b"], "error": pa.array([None, "too long"], pa.string())})


def test_parts_are_found_again_with_their_failures(tmp_path):
    with Output(tmp_path / "new" / "folder") as output:
        assert output.done() == (None, 0)
        output.claim({"seed": 1})
        output.add(PART)
    with Output(tmp_path / "new" / "folder") as output:
        output.add(pa.table({"id": ["c"], "error": pa.array([None], pa.string())}))
        ids, failed = output.done()
        assert (sorted(ids.to_pylist()), failed) == (["a", "b", "c"], 1)


def test_a_part_that_was_being_written_when_the_process_died_is_none(tmp_path):
    with Output(tmp_path) as output:
        output.claim({})
        output.add(PART)
    (tmp_path / ".part-000001.parquet").write_bytes(b"PAR1 half of")
    with Output(tmp_path) as output:
        assert len(output.done()[0]) == 2
    assert not (tmp_path / ".part-000001.parquet").exists()


def test_a_part_that_is_damaged_is_named(tmp_path):
    with Output(tmp_path) as output:
        output.claim({})
        output.add(PART)
        (tmp_path / "part-000000.parquet").write_bytes(b"PAR1 half of")
        with pytest.raises(SimsdError, match="part-000000.parquet cannot be read .*: remove it"):
            output.done()


def test_a_job_without_results_leaves_the_folder_to_the_next(tmp_path):
    with Output(tmp_path) as output:
        output.claim({"seed": 1})
        output.claim({"seed": 2})
        output.add(PART)
        with pytest.raises(SimsdError, match="seed 2, and this one has 3: name another output"):
            output.claim({"seed": 3})


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SimsdError, match="file/results cannot be written: Not a directory"):
        Output(tmp_path / "file" / "results")


def test_checkpoints_that_differ_in_a_weight_are_told_apart(tmp_path):
    assert fingerprint("tiny-target") == fingerprint("tiny-target") != fingerprint("tiny-draft")
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    seen = set()
    for last in (b"a", b"b"):
        weights.write_bytes(bytes(300_000) + last)
        seen.add(fingerprint(str(tmp_path)))
    assert len(seen) == 2


def test_an_adapter_is_told_from_another_and_from_that_of_another_model(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"a")
    seen = {fingerprint("tiny-target")}
    for base in ("tiny-target", "tiny-draft"):
        config = {"peft_type": "LORA", "base_model_name_or_path": base}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        seen.add(fingerprint(str(tmp_path)))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"b")
    assert len({*seen, fingerprint(str(tmp_path))}) == 4
