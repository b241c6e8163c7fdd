"""Where the best learning rate is at several widths, with `scale_lr: mup` and without.

`python -m benchmarks.width_transfer [--widths 64 128 256] [--steps 300] [--optimizer adamw]` prints a JSON line for
each width and setting: the loss at each learning rate, and the best of them, between grid points by a parabola. Masked
bytes of Python's own library; the loss is that of the last tenth of the steps. lr of mup is that of the narrowest
width.
"""

import json
import math
import sysconfig
from pathlib import Path

import numpy as np
import torch

from benchmarks.arguments import parser_of
from data.keyed import keyed_generator
from flexbert import FlexBertConfig, build
from recipe.schedules import set_learning_rate
from recipe.slots import OPTIMIZERS

_SPECIAL, _MASK, _ROW, _ROWS, _RATE = 5, 3, 64, 16, 0.2


def corpus() -> np.ndarray:
    """Bytes of some files of the standard library, as token ids."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8).astype(np.int64) + _SPECIAL


def final_loss(text: np.ndarray, width: int, lr: float, steps: int, seed: int, optimizer: dict[str, object]) -> float:
    """Mean loss in nats of the last tenth of the steps, each of 16 rows of 64 bytes of which a fifth are masked. The
    same rows and masks for every width and learning rate; inf where it diverges."""
    config = {
        "vocab_size": 256 + _SPECIAL + 59,
        "hidden_size": width,
        "num_hidden_layers": 3,
        "num_attention_heads": width // 16,
        "intermediate_size": 2 * width,
        "max_position_embeddings": _ROW,
        "init": "depth_scaled",
    }
    model = build(FlexBertConfig.from_dict(config), seed=seed)
    stepper = OPTIMIZERS.build(OPTIMIZERS.parse(optimizer), model=model, lr=lr)
    bounds = torch.arange(0, _ROWS * _ROW + 1, _ROW, dtype=torch.int32)
    warmup, losses = max(1, steps // 10), []
    for step in range(steps):
        draw = keyed_generator(seed, "rows", step)
        starts = draw.integers(0, len(text) - _ROW, _ROWS)
        rows = torch.from_numpy(np.concatenate([text[start : start + _ROW] for start in starts]))
        masked = torch.from_numpy(draw.random(len(rows)) < _RATE)
        loss = model(rows.masked_fill(masked, _MASK), bounds, _ROW, labels=rows.masked_fill(~masked, -100)).loss
        assert loss is not None
        loss.backward()
        set_learning_rate(stepper, lr * min(1, (step + 1) / warmup), lr)
        stepper.step()
        stepper.zero_grad()
        losses.append(float(loss.detach()))
    last = float(np.mean(losses[-max(1, steps // 10) :]))
    return last if math.isfinite(last) else math.inf


def best(lrs: list[float], losses: list[float]) -> float:
    """Where the parabola through the lowest loss and its neighbours has its lowest point, in log lr; at the grid's ends
    the end."""
    at = int(np.argmin(losses))
    if at in (0, len(lrs) - 1) or not np.isfinite(losses[at - 1 : at + 2]).all():
        return lrs[at]
    below, here, above = losses[at - 1 : at + 2]
    shift = 0.5 * (below - above) / (below - 2 * here + above)
    return lrs[at] * (lrs[at + 1] / lrs[at]) ** shift


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--lrs", type=float, nargs="+", default=[2.0**-power for power in range(11, 4, -1)])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--optimizer", default="adamw")
    given = parser.parse_args()
    text = corpus()
    for scaled in (True, False):
        for width in given.widths:
            options: dict[str, object] = {"name": given.optimizer}
            if scaled:
                options |= {"scale_lr": "mup", "base_hidden_size": min(given.widths)}
            losses = [
                float(np.mean([final_loss(text, width, lr, given.steps, seed, options) for seed in given.seeds]))
                for lr in given.lrs
            ]
            line = {"scale_lr": "mup" if scaled else None, "width": width, "best_lr": best(given.lrs, losses)}
            shown = dict(zip(map(str, given.lrs), losses, strict=True))
            print(json.dumps({**line, "optimizer": given.optimizer, "losses": shown}), flush=True)


if __name__ == "__main__":
    main()
