"""Target networks, teachers and ensembles: complete functions, trained on small real data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F  # noqa: N812, as everybody
from torch.testing import assert_close

import emajit
from emajit import schedules
from tests import reference

pytestmark = pytest.mark.usefixtures("one_thread")


class Recorder:
    """What `init`, `update` and `update_` were given, in order, in tensors of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.params: list[dict[str, Tensor]] = []
        for name in ("init", "update", "update_"):
            monkeypatch.setattr(emajit, name, self._recording(getattr(emajit, name)))

    def _recording(self, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            params = args[0] if len(args) == 1 else args[1]
            self.params.append({name: p.detach().clone() for name, p in params.items()})
            return function(*args, **options)

        return call


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


# A deep Q-network with a target network.

WIND = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 1, 0])
MOVES = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])
CELLS, START, GOAL = 70, 30, 37


def walk(cell: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """The cells after a move, and whether each is the goal.

    The windy grid of Sutton and Barto, "Reinforcement Learning" (2nd edition, example 6.5): 7 rows
    of 10 columns, where the wind of the column that is left blows up by as many rows. Each move
    costs 1; the shortest way from the start to the goal takes 15.
    """
    row, column = torch.stack([cell // 10, cell % 10]) + MOVES[action].T
    row, column = (row - WIND[cell % 10]).clamp(0, 6), column.clamp(0, 9)
    following = 10 * row + column
    return following, following == GOAL


def deep_q_learning(
    decay: float | schedules.Schedule, interval: int = 1, steps: int = 4000, discount: float = 0.95
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A Q-network and its target network, which is a shadow of it and no second module."""
    q = nn.Sequential(nn.Embedding(CELLS, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.Adam(q.parameters(), lr=5e-3)
    params: dict[str, Tensor] = dict(q.named_parameters())
    target = emajit.init(params)
    walkers = 16
    cell = torch.randint(CELLS, (walkers,))
    replay = torch.zeros(4, steps * walkers, dtype=torch.int64)
    for step in range(steps):
        with torch.no_grad():
            greedy = q(cell).argmax(dim=1)
        action = torch.where(torch.rand(walkers) < 0.2, torch.randint(4, (walkers,)), greedy)
        following, done = walk(cell, action)
        seen = (step + 1) * walkers
        replay[:, seen - walkers : seen] = torch.stack([cell, action, following, done])
        restart = done | (torch.rand(walkers) < 0.1)
        cell = torch.where(restart, torch.randint(CELLS, (walkers,)), following)

        states, actions, nexts, ends = replay[:, torch.randint(seen, (128,))]
        with torch.no_grad():
            best = functional_call(q, target, (nexts,)).amax(dim=1)
        wanted = -1 + discount * best * (1 - ends)
        loss: Any = F.smooth_l1_loss(q(states).gather(1, actions[:, None])[:, 0], wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % interval == 0:
            emajit.update_(target, params, step // interval, decay=decay)
    return q, target


def hard(interval: int) -> schedules.Schedule:
    """A copy at each `interval`-th step (a decay of 0), nothing between (a decay of 1)."""
    return lambda step: 1.0 * ((step + 1) % interval != 0)


def moves_to_goal(q: nn.Module) -> int:
    """The moves that the greedy policy takes from the start; 100 if it never arrives."""
    cell = torch.tensor([START])
    for moves in range(1, 100):
        with torch.no_grad():
            cell, done = walk(cell, q(cell).argmax(dim=1))
        if done:
            return moves
    return 100


def true_values(discount: float = 0.95) -> Tensor:
    """Value iteration: what each action in each cell is worth."""
    cells, actions = torch.arange(CELLS).repeat_interleave(4), torch.arange(4).repeat(CELLS)
    following, done = walk(cells, actions)
    values = torch.zeros(CELLS, 4)
    for _ in range(100):
        values = (-1 + discount * values.amax(dim=1)[following] * ~done).view(CELLS, 4)
    return values


class TestTargetNetwork:
    @pytest.mark.parametrize(("decay", "interval"), [(0.995, 1), (0.0, 100)])
    def test_learns_the_shortest_way(self, decay: float, interval: int) -> None:
        q, target = deep_q_learning(decay, interval)
        assert moves_to_goal(q) == 15
        with torch.no_grad():
            found = functional_call(q, target, (torch.tensor(START),))
        assert_close(found.amax(), true_values()[START].amax(), rtol=0.02, atol=0)

    @pytest.mark.parametrize(
        ("decay", "interval"), [(0.995, 1), (schedules.every(schedules.constant(0.995), 10), 10)]
    )
    def test_lags_as_the_formula_says(
        self, decay: float | schedules.Schedule, interval: int, recorder: Recorder
    ) -> None:
        _, target = deep_q_learning(decay, interval, steps=400)
        first, *params = recorder.params
        beta, updates = 0.995**interval, 400 // interval
        assert len(params) == updates
        for name, average in target.items():
            closed = beta**updates * first[name].double()
            for step, p in enumerate(params):
                closed += (1 - beta) * beta ** (updates - 1 - step) * p[name].double()
            assert_close(average.double(), closed, rtol=0, atol=1e-5)
            assert (average - params[-1][name]).abs().max() > 0.01

    def test_a_hard_update_is_also_a_schedule(self) -> None:
        _, by_interval = deep_q_learning(0.0, 100, steps=250)
        torch.manual_seed(0)
        _, by_schedule = deep_q_learning(hard(100), steps=250)
        assert_close(by_schedule, by_interval, rtol=0, atol=0)

    def test_a_decay_of_0_is_the_online_network(self) -> None:
        q, target = deep_q_learning(0.0, steps=50)
        assert_close(target, dict(q.named_parameters()), rtol=0, atol=0)


# A student and its teacher.


def shaken(images: Tensor) -> Tensor:
    """Each 8x8 image moved by up to a pixel each way, with noise, and a fifth of it masked."""
    moves = F.pad(images.view(-1, 8, 8), (1, 1, 1, 1)).unfold(1, 8, 1).unfold(2, 8, 1)
    down, right = torch.randint(3, (2, len(images)))
    moved = moves[torch.arange(len(images)), down, right].flatten(1)
    noisy = moved + 0.1 * torch.randn_like(moved)
    return noisy * (torch.rand_like(noisy) > 0.2)


def perceptron(inputs: int = 64, outputs: int = 64) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, outputs)
    )


def self_supervised_teacher(student: nn.Module, images: Tensor, steps: int = 600) -> nn.Module:
    """The teacher of BYOL (arXiv 2006.07733), an average of the student.

    Its batch norm takes the averaged statistics of the student's, as in EMAN (arXiv 2101.08482).
    """
    predictor = perceptron()
    optimizer = torch.optim.AdamW([*student.parameters(), *predictor.parameters()], lr=3e-3)
    tensors: dict[str, Tensor] = {
        **dict(student.named_parameters()),
        **dict(student.named_buffers()),
    }
    shadow = emajit.init(tensors)
    teacher = emajit.averaged_module(student, shadow).eval()
    decay = schedules.cosine(0.99, 1.0, steps)
    for step in range(steps):
        batch = images[torch.randint(len(images), (256,))]
        one, other = shaken(batch), shaken(batch)
        with torch.no_grad():
            wanted = teacher(torch.cat([other, one]))
        guessed = predictor(student(torch.cat([one, other])))
        loss: Any = -F.cosine_similarity(guessed, wanted).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        emajit.update_(shadow, tensors, step, decay=decay)
    return teacher


def digits() -> tuple[Tensor, Tensor]:
    """1797 images of shape (64,) in [0, 1], shuffled, and their digits."""
    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    order = torch.randperm(len(images))
    return images[order].float() / 16, labels[order]


def nearest_neighbours(features: Tensor, labels: Tensor) -> float:
    """The share of those after the first 1000 whose 5 nearest of the first 200 tell the digit."""
    classifier = KNeighborsClassifier(5, metric="cosine").fit(features[:200], labels[:200])
    return float(classifier.score(features[1000:], labels[1000:]))


class TestTeacher:
    def test_tells_shaken_digits_apart(self) -> None:
        images, labels = digits()
        shown = shaken(images)
        student = perceptron().eval()
        with torch.no_grad():
            before = nearest_neighbours(student(shown), labels)
        teacher = self_supervised_teacher(student.train(), images[:1000])
        with torch.no_grad():
            features = teacher(shown)
        assert nearest_neighbours(features, labels) > before + 0.2
        spread = F.normalize(features, dim=1).std(dim=0).mean() * features.shape[1] ** 0.5
        assert spread > 0.5  # 1 if the features are spread evenly over the sphere, 0 if collapsed

    def test_has_averages_of_all_buffers_but_those_that_count(self, recorder: Recorder) -> None:
        images, _ = digits()
        student = perceptron()
        teacher = self_supervised_teacher(student, images, steps=20)
        expected, *tensors = recorder.params
        for step, seen in enumerate(tensors):
            beta = schedules.cosine(0.99, 1.0, 20)(step)
            expected = reference.update(expected, seen, float(beta))
        assert_close(teacher.state_dict(), expected, rtol=1e-6, atol=1e-7)
        assert teacher.get_buffer("1.num_batches_tracked") == 20
        variance = "1.running_var"
        assert not torch.equal(teacher.get_buffer(variance), student.get_buffer(variance))


# An ensemble, trained and averaged as one tree of stacked parameters.


def bagging(
    models: list[nn.Module],
    images: Tensor,
    labels: Tensor,
    steps: int = 300,
    backend: str | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The stacked parameters of the models, each trained on batches of its own, and their averages.

    `backend` is that of `torch.compile`, for the whole step.
    """
    params, _ = stack_module_state(models)
    params = {name: p.detach() for name, p in params.items()}
    shadow = emajit.init(params)

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(models[0], params, (x,)), y)

    def train_step(params: Any, shadow: Any, step: Tensor, x: Tensor, y: Tensor) -> tuple[Any, Any]:
        gradients = vmap(grad(loss))(params, x, y)
        params = {name: p - 0.5 * gradients[name] for name, p in params.items()}
        return params, emajit.update(shadow, params, step, decay=schedules.warmup(0.98))

    if backend:
        train_step = torch.compile(train_step, fullgraph=True, backend=backend)
    for step in range(steps):
        batch = torch.randint(len(images), (len(models), 32))
        params, shadow = train_step(
            params, shadow, torch.tensor(step), images[batch], labels[batch]
        )
    return params, shadow


def members(number: int = 5) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(64, 33), nn.ReLU(), nn.Linear(33, 10)) for _ in range(number)]


def member(params: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {name: p[i] for name, p in params.items()}


class TestEnsemble:
    def test_each_member_has_the_average_it_would_have_alone(self, recorder: Recorder) -> None:
        _, shadow = bagging(members(), *digits(), steps=100)
        first, *params = recorder.params
        for i in range(5):
            alone = member(first, i)
            expected = {name: p.double() for name, p in alone.items()}
            for step, seen in enumerate(params):
                decay = schedules.warmup(0.98)(step)
                alone = emajit.update(alone, member(seen, i), step, decay=decay)
                expected = reference.update(expected, member(seen, i), float(decay))
            found = member(shadow, i)
            assert_close(found, alone, rtol=1e-6, atol=1e-7)
            assert_close(
                {name: p.double() for name, p in found.items()}, expected, rtol=0, atol=1e-6
            )

    def test_averages_are_better_on_new_digits(self) -> None:
        images, labels = digits()
        models = members()
        params, shadow = bagging(models, images[:1000], labels[:1000])

        def loss(params: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(
                functional_call(models[0], params, (images[1000:],)), labels[1000:]
            )

        raw, averaged = vmap(loss)(params), vmap(loss)(shadow)
        assert (averaged < raw).all()

    def test_in_a_compiled_step(self) -> None:
        models, data = members(), digits()
        torch.manual_seed(1)
        _, plain = bagging(models, *data, steps=10)
        torch.manual_seed(1)
        _, compiled = bagging(models, *data, steps=10, backend="aot_eager")
        assert_close(compiled, plain, rtol=1e-5, atol=1e-6)

    def test_each_member_may_have_a_decay_of_its_own(self) -> None:
        params, shadow = bagging(members(3), *digits(), steps=5)
        decays = torch.tensor([0.9, 0.99, 0.999], dtype=torch.float64)

        def update(shadow: Any, params: Any, decay: Tensor) -> Any:
            return emajit.update(shadow, params, 5, decay=decay)

        found = vmap(update)(shadow, params, decays)
        for i, decay in enumerate(decays.tolist()):
            expected = emajit.update(member(shadow, i), member(params, i), 5, decay=decay)
            assert_close(member(found, i), expected, rtol=1e-6, atol=1e-7)
