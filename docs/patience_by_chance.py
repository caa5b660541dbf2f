"""python docs/patience_by_chance.py: how long a stage of the curriculum lasts where the losses of single
steps have a noise of 10 % and fall by 0, 1, 3 or 10 % in a hundred steps; means over 200 stages, which
are cut at 5,000 steps.

Without a fall it is chance alone: the lowest of k losses stays the lowest of m with probability k / m,
whatever their noise.
"""

import math

import numpy as np

from largescale.curriculum import PatiencePacing

FALLS = (0.0, 0.01, 0.03, 0.1)
NOISE = 0.1
LONGEST = 5_000


def stage_length(pacing: PatiencePacing, fall: float, rng: np.random.Generator) -> int:
    """The steps of one stage whose loss falls by `fall` in a hundred steps."""
    state = pacing.start(1)
    step = 0
    while state.index and step < LONGEST:
        expected = math.exp(step / 100 * math.log(1 - fall))
        state = pacing.advance(state, expected * (1 + NOISE * rng.normal()))
        step += 1
    return step


def main() -> None:
    falls = " | ".join(f"{fall:.0%}" for fall in FALLS)
    print(f"| patience | smoothing | {falls} |")
    print("|---:|---:|" + "---:|" * len(FALLS))
    for patience in (100, 200, 400):
        for smoothing in (0.0, 0.95, 0.99):
            rng = np.random.default_rng(0)
            cells = [str(patience), f"{smoothing:g}"]
            for fall in FALLS:
                pacing = PatiencePacing(patience, smoothing)
                lengths = [stage_length(pacing, fall, rng) for _ in range(200)]
                cells.append(f"{np.mean(lengths):,.0f}")
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
