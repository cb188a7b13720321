"""Items under a time budget: their order, the plan, when it ends, and what stays decided."""

import random

import pytest

from lora_kit import budget
from lora_kit.claims import Gate
from lora_kit.types import Verdict

GATES = [Gate(task="a", metric="m", better_than="base"), Gate(task="b", metric="m", no_worse_than="base", margin=0.1),
         Gate(task="b", metric="m", artifact="q8", no_worse_than="merged", margin=0.1)]


def questions(number, *, size=1, strata=("",)):
    return [budget.Question(item_id=f"{place}", cluster=f"c{place // size}",
                            stratum=strata[place // size % len(strata)]) for place in range(number)]


def test_the_order_is_the_seeds_and_keeps_clusters_whole():
    asked = questions(60, size=3)
    one, same, other = (budget.in_order(asked, seed) for seed in ("1 a", "1 a", "2 a"))
    assert one == same and one != other and sorted(one, key=lambda each: int(each.item_id)) == asked
    clusters = [each.cluster for each in one]
    assert clusters != sorted(clusters, key=lambda name: int(name[1:]))
    assert all(len({each.cluster for each in one[place:place + 3]}) == 1 for place in range(0, 60, 3))


def test_every_beginning_has_each_stratum_in_its_share():
    strata = ["rare"] + ["common"] * 9
    ordered = budget.in_order(questions(200, strata=strata), "s")
    for end in (20, 50, 100, 150):
        assert abs(sum(each.stratum == "rare" for each in ordered[:end]) - end / 10) <= 2


def test_a_batch_ends_with_a_cluster():
    ordered = questions(20, size=4)
    assert budget.up_to(ordered, 0.1) == 4 and budget.up_to(ordered, 0.45) == 12 and budget.up_to(ordered, 1.0) == 20
    assert budget.up_to(ordered, 0.1, fewest=5) == 8 and budget.up_to(questions(3), 0.1, fewest=8) == 3
    assert budget.up_to([], 0.5) == 0


def test_the_plan_fits_the_time():
    assert budget.plan(1000, 0.1, 1, 10) == pytest.approx([0.1, 0.4, 0.7, 1.0])
    # 100 s less a tenth, three loads of 5 s: 75 s at 150 s for everything is half of the items more.
    assert budget.plan(100, 0.1, 5, 150) == pytest.approx([0.1, 0.1 + 0.5 / 3, 0.1 + 1 / 3, 0.6])
    assert budget.plan(10, 0.1, 5, 10) == pytest.approx([0.1, 0.5])  # no time for three loads
    assert budget.plan(5, 0.1, 5, 10) == [0.1] and budget.plan(-3, 0.1, 1, 10) == [0.1]


def test_what_open_gates_need():
    assert budget.needed(GATES, {}) == {"merged": ["a", "b"], "base": ["a", "b"], "q8": ["b"]}
    passed = Verdict(outcome="PASS", claim="", evidence="")
    assert budget.needed(GATES, {0: passed, 1: passed}) == {"q8": ["b"], "merged": ["b"]}
    fewshot = Gate(task="a", metric="m", better_than="base-fewshot")
    locked = Gate(task="a", metric="m", better_than="baseline")
    assert budget.needed([fewshot], {}) == {"merged": ["a"], "base": ["a"]}
    assert budget.needed([locked], {}) == {"merged": ["a"]}


class World:
    """A clock that scoring moves on, and gates that are decided after so many items of their task."""

    def __init__(self, *, seconds_per_item=1.0, load=2.0, decided_after=(10**9,) * 3):
        self.now, self.batches, self.calls = 100.0, [], []
        self.seconds_per_item, self.load, self.decided_after = seconds_per_item, load, decided_after
        self.scored = {}

    def clock(self):
        return self.now

    def score(self, batch):
        self.batches.append(batch)
        for task, ids in batch.items.items():
            self.scored.setdefault((batch.artifact, task), []).extend(ids)
        costs = {task: self.seconds_per_item * len(ids) for task, ids in batch.items.items()}
        self.now += self.load + sum(costs.values())
        return budget.Cost(fixed=self.load, tasks=costs)

    def decide(self, shares, decided):
        self.calls.append((tuple(shares), dict(decided)))
        outcomes = ["PASS" if len(self.scored[gate.artifact, gate.task]) >= after else "INCONCLUSIVE"
                    for gate, after in zip(GATES, self.decided_after, strict=True)]
        return [decided.get(place) or Verdict(outcome=outcome, claim="", evidence="")
                for place, outcome in enumerate(outcomes)]

    def spend(self, seconds, number=100):
        ordered = {task: budget.in_order(questions(number), task) for task in ("a", "b")}
        return budget.spend(ordered, GATES, seconds, self.score, self.decide, started=100.0, clock=self.clock), ordered


def test_it_stops_when_every_gate_is_decided_and_scores_no_more_of_what_is():
    world = World(decided_after=(1, 30, 70))
    spent, ordered = world.spend(10_000)
    assert spent.stopped == "every gate is decided" and set(spent.decided) == {0, 1, 2}
    assert [look["num_items"] for look in spent.looks] == [{"a": 10, "b": 10}, {"a": 40, "b": 40}, {"a": 70, "b": 70}]
    assert len(world.scored["merged", "a"]) == 10 and len(world.scored["base", "b"]) == 40
    assert world.scored["q8", "b"] == [each.item_id for each in ordered["b"][:70]]
    assert [call[0] for call in world.calls] == [(0.1,), (0.1, 0.4), pytest.approx((0.1, 0.4, 0.7))]
    assert [set(call[1]) for call in world.calls] == [set(), {0}, {0, 1}]
    assert [batch.is_first for batch in world.batches].count(True) == 3


def test_all_items_are_the_end():
    spent, _ = World().spend(10_000)
    assert spent.stopped == "all items are scored" and spent.decided == {}
    assert [look["share_of_plan"] for look in spent.looks] == pytest.approx([0.1, 0.4, 0.7, 1.0])


def test_the_time_is_kept_and_the_last_look_has_the_whole_level():
    world = World()
    spent, _ = world.spend(200)
    assert spent.stopped == "the time is used up" and world.now - 100 <= 200
    assert spent.looks[-1]["share_of_plan"] == 1.0 and 20 < spent.looks[-1]["num_items"]["a"] < 60
    assert spent.looks[-1]["seconds"] == pytest.approx(world.now - 100)


def test_a_machine_that_gets_slower_ends_it_early():
    world = World()
    real = world.score

    def slower(batch):
        if not batch.is_first:
            world.seconds_per_item = 2.5
        return real(batch)

    world.score = slower
    spent, _ = world.spend(300)
    assert spent.stopped == "the time is used up" and spent.looks[-1]["share_of_plan"] < 1.0


def test_too_little_time_is_one_look_with_the_whole_level():
    world = World()
    spent, _ = world.spend(1)
    assert [call[0] for call in world.calls] == [(1.0,)] and spent.stopped == "the time is used up"


@pytest.mark.parametrize("number", [1, 3, 9, 11])
def test_few_items_end_without_a_look_at_nothing_new(number):
    world = World()
    spent, _ = world.spend(10_000, number)
    assert spent.stopped == "all items are scored"
    shares = world.calls[-1][0]
    assert shares[-1] == 1.0 and all(one < other for one, other in zip(shares, shares[1:], strict=False))


def test_tasks_of_very_different_size_end():
    generator = random.Random(0)
    for _ in range(20):
        world = World(seconds_per_item=generator.uniform(0.01, 3))
        ordered = {"a": questions(generator.randrange(1, 400), size=generator.choice([1, 7])), "b": questions(5)}
        spent = budget.spend(ordered, GATES, generator.uniform(1, 500), world.score, world.decide, started=100.0,
                             clock=world.clock)
        shares = world.calls[-1][0]
        assert spent.stopped and all(one < other for one, other in zip(shares, shares[1:], strict=False))
