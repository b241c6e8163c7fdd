"""The benchmarks' command lines: what is not used is refused, with exit code 2 and its name, before any work."""

import runpy
import sys

import pytest

CASES = [
    (["encoder", "--only", "modernbrt"], "--only: unknown 'modernbrt', valid names: modernbert, bert-base, memory"),
    (["encoder", "--dtypes", "fp16"], "--dtypes: unknown 'fp16', valid names: fp32, bf16"),
    (["encoder", "--cases", "1 x 1"], "--cases: unknown '1 x 1'"),
    (["encoder", "--profile", "--only", "memory"], "--only: --profile does not look at it"),
    (["encoder", "--profile", "--cases", "1 x 8192"], "--cases: --profile does not look at it"),
    (["encoder", "--profile", "--limit", "3"], "--limit: --profile does not look at it"),
    (["encoder", "--only", "memory", "--limit", "3"], "--limit: --only memory does not look at it"),
    (["encoder", "--rounds", "0"], "--rounds: expected a number, 1 or more, got '0'"),
    (["fuzz_config", "3", "99"], "unrecognized arguments: 99"),
    (["fuzz_config", "x"], "expected a number, 1 or more, got 'x'"),
    (["loader", "a", "b"], "unrecognized arguments: b"),
    (["scale", "a", "b"], "unrecognized arguments: b"),
    (["startup", "a", "b"], "unrecognized arguments: b"),
    (["tokenise", "1", "2"], "unrecognized arguments: 2"),
    (["kills", "laoder"], "expected a number, 1 or more, got 'laoder'"),
    (["kills", "loader", "1", "2", "3"], "unrecognized arguments: 3"),
    (["resilience", "1", "2", "3"], "unrecognized arguments: 3"),
    (["replica", "a", "b"], "expected KEY=VALUE, got 'b'"),
    (["replica", "seed=1", "b"], "expected KEY=VALUE, got 'b'"),
    (["gpu", "--agreement", "--rounds", "3"], "--rounds: --agreement does not look at it"),
    (["gpu", "--agreement", "--cases", "4 x 8192"], "--cases: --agreement does not look at it"),
    (["gpu", "--agreement", "--ways", "flex"], "--ways: --agreement does not look at it"),
    (["gpu", "--ways", "peer_sdpa"], "--ways: one of ours must be among them"),
    (["gpu", "--ways", "fast"], "--ways: unknown 'fast'"),
    (["gpu_check", "--sections", "atention.flex"], "--sections: unknown 'atention.flex', valid names: machine, attention."),
    (["gpu_check", "--minutes", "0"], "--minutes: expected a number, 1 or more, got '0'"),
    (["scaling", "--gpus", "7"], "--gpus: batches of 4608 rows cannot be divided among 7 GPUs"),
    (["scaling", "--gpus", "8,x"], "--gpus: expected a number, 1 or more, got 'x'"),
    (["tiny_sweep", "x", "--seeds", "0"], "--seeds: expected a number, 1 or more, got '0'"),
    (["calibration", "x", "--sweeps", "0"], "--sweeps: expected a number, 1 or more, got '0'"),
    (["time_to_loss", "x", "--tokens", "0"], "--tokens: expected a number, 1 or more, got '0'"),
    (["trainer_peer", "x", "y"], "the following arguments are required: output, --tokens, --lr, --rows, --seed"),
    (["width_transfer", "x"], "unrecognized arguments: x"),
    (["overhead", "seed"], "expected KEY=VALUE, got 'seed'"),
    (["overhead", "trainer.gradient_clip_norm=1.0"], "trainer.gradient_clip_norm: the bare loop has nothing of the kind"),
    (["overhead", "trainer.microbatch_size=2"], "trainer.microbatch_size: the bare loop has nothing of the kind"),
    (["evaluating", "seed"], "expected KEY=VALUE, got 'seed'"),
    (["evaluating", "evaluations=[]"], "evaluations=[]: evaluations: this benchmark sets it: leave it out"),
    (["overhead", "ema.decay=0.9"], "ema.decay: the bare loop has nothing of the kind"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "line"), CASES)
def test_an_argument_is_used_or_refused(
    arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = f"benchmarks.{arguments[0]}"
    monkeypatch.setattr(sys, "argv", [module, *arguments[1:]])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__")
    said = capsys.readouterr()
    assert (end.value.code, said.out) == (2, "")
    assert line in said.err.splitlines()[-1]
