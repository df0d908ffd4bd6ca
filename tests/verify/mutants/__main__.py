"""`make mutants`: the share of mechanical changes to hand-written backward passes that gradcheck sees.

make mutants ARGS="--seed 1 --count 100 --ops gelu layer_norm --verbose"
make mutants ARGS="--twins --count 700"
"""

import argparse
import random
import sys
from collections import Counter

from tests.verify.mutants import twins
from tests.verify.mutants.changes import changes
from tests.verify.mutants.running import home, outcome_of, warm
from tests.verify.mutants.sources import file_of, gradient_functions
from torchbp.ops._op import all_ops


def sampled(seed, count, names=()):
    """Return ``count`` (op, change), chosen evenly over ops and kinds of change."""
    draw = random.Random(seed)
    left, seen = {}, set()
    ops = [op for op in all_ops().values() if not op.estimator and (not names or op.name in names)]
    draw.shuffle(ops)
    for op in ops:
        own = []
        for module, function in gradient_functions(*home(op)):
            own += list(changes(file_of(module), function))
        draw.shuffle(own)
        left[op.name] = own
    chosen, kinds = [], Counter()
    while len(chosen) < count and any(left.values()):
        for name, own in left.items():
            own[:] = [c for c in own if c not in seen]
            if not own or len(chosen) == count:
                continue
            rarest = min(kinds[c.kind] for c in own)
            change = next(c for c in own if kinds[c.kind] == rarest)
            seen.add(change)
            kinds[change.kind] += 1
            chosen.append((name, change))
    return chosen


def _outcomes(args):
    if args.twins:
        for change in twins.sampled(args.seed, args.count):
            yield change.function, change, twins.outcome_of(change)
    else:
        for name, change in sampled(args.seed, args.count, args.ops):
            yield name, change, outcome_of(name, change)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--ops", nargs="+", default=(), choices=sorted(all_ops()), metavar="NAME")
    parser.add_argument("--twins", action="store_true", help="change right twins, not ops")
    parser.add_argument("--verbose", action="store_true", help="a line for every change")
    args = parser.parse_args()
    counts = Counter()
    warm()
    for k, (name, change, outcome) in enumerate(_outcomes(args)):
        counts[outcome.kind] += 1
        if args.verbose or outcome.kind not in ("caught", "loud", "equal"):
            print(f"{k} {outcome.kind}: {name}: {change}\n    {outcome.detail}", flush=True)
            for note in outcome.notes:
                print(f"    noted: {note}", flush=True)
    caught, missed = counts["caught"], counts["missed"]
    print(", ".join(f"{kind} {n}" for kind, n in sorted(counts.items())))
    print(f"caught {caught} of {caught + missed} ({caught / max(1, caught + missed):.1%})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
