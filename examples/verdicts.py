"""What three gates say of the same answers: from how many flipped each way to PASS, FAIL or INCONCLUSIVE.

    python examples/verdicts.py --items 200 --lost 9 --gained 13

Two models answered the same questions. Only the questions that one of them got right and the other did not
tell them apart; docs/eval.md explains what is printed.
"""

import argparse

from lora_kit import gates, power
from lora_kit.claims import Gate


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=200, help="questions")
    parser.add_argument("--lost", type=int, default=9, help="right before, wrong now")
    parser.add_argument("--gained", type=int, default=13, help="wrong before, right now")
    parser.add_argument("--margins", type=float, nargs="+", default=[0.05, 0.02], help="losses that are accepted")
    args = parser.parse_args(arguments)

    flipped = args.lost + args.gained
    discordance = 2 * min(args.lost, args.gained) / args.items
    smallest = power.smallest_detectable(
        lambda size: power.chance_paired(args.items, size, discordance=discordance), most=0.9)
    print(f"{args.items} questions, {args.gained} gained, {args.lost} lost")
    if smallest is not None:
        print(f"so many can show a change of {100 * smallest:.1f} points, with 80 % chance; less cannot be seen\n")

    now = [0.0] * args.lost + [1.0] * args.gained + [1.0] * (args.items - flipped)
    before = [1.0] * args.lost + [0.0] * args.gained + [1.0] * (args.items - flipped)
    tuned, base = ([{"item_id": number, "cluster": number, "score": score} for number, score in enumerate(scores)]
                   for scores in (now, before))
    verdicts = []
    for gate in [Gate(task="questions", metric="exact_match", better_than="base"),
                 *(Gate(task="questions", metric="exact_match", no_worse_than="base", margin=margin)
                   for margin in args.margins)]:
        found = gates.evidence(tuned, base, gate, higher_is_better=True)
        [verdict] = gates.decide([gate], [found])
        verdicts.append(verdict)
        print(f"{verdict.outcome:13} {verdict.claim}\n{'':13} {verdict.evidence}")
    return verdicts


if __name__ == "__main__":
    main()
