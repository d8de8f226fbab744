"""Reconstructions against the truth, coefficients against quadrature, files against faults."""

from __future__ import annotations

import math
import os
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import emajit
from emajit import checkpoint, posthoc, schedules
from tests.counting import own_memory, tells_memory

TRACKED = [0.05, 0.10]
STEPS = 4096


def walk(steps: int = STEPS) -> Tensor:
    """A recorded trajectory of weights: a random walk with a drift, float64."""
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(steps, 64, generator=generator, dtype=torch.float64) + 0.3).cumsum(0)


def average(trajectory: Tensor, sigma_rel: float) -> Tensor:
    """The average of that length, computed directly."""
    decay = schedules.power_function(sigma_rel)
    shadow = trajectory[0].clone()
    for step, weights in enumerate(trajectory):
        emajit.update_(shadow, weights, step, decay=decay)
    return shadow


def train(folder: Path, count: int, dtype: torch.dtype | None = None, steps: int = STEPS) -> Tensor:
    """The natural loop: both averages in one pass, a snapshot every so often."""
    trajectory = walk(steps)
    decays = [schedules.power_function(sigma_rel) for sigma_rel in TRACKED]
    shadows = [{"w": trajectory[0].clone()} for _ in TRACKED]
    for step, weights in enumerate(trajectory):
        emajit.update_many_(shadows, {"w": weights}, step, decays=decays)
        if (step + 1) % (steps // count) == 0:
            posthoc.save(folder, shadows, step + 1, sigma_rel=TRACKED, dtype=dtype)
    return trajectory


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    folders: dict[Any, Path] = {}
    for count, dtype in ((8, None), (16, None), (32, None), (64, None), (64, torch.float16)):
        key = count if dtype is None else "half"
        folders[key] = tmp_path_factory.mktemp(f"run {key}")
        train(folders[key], count, dtype)
    return folders


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


class TestTruth:
    @pytest.mark.parametrize("sigma_rel", [0.05, 0.06, 0.075, 0.09, 0.10])
    def test_within_the_span_64_snapshots_are_exact_to_1e6(
        self, runs: dict[Any, Path], sigma_rel: float
    ) -> None:
        truth = average(walk(), sigma_rel)
        found = posthoc.reconstruct(posthoc.snapshots(runs[64]), sigma_rel, dtype=torch.float64)
        assert relative(found["w"], truth) < 1e-6

    def test_of_any_random_walk_they_are_exact_to_5e6(self, tmp_path: Path) -> None:
        """100 walks without a drift, to which the error would be small."""
        generator = torch.Generator().manual_seed(5)
        steps = torch.randn(STEPS, 100, 8, generator=generator, dtype=torch.float64)
        lengths = [*TRACKED, 0.06, 0.075]
        decays = [schedules.power_function(sigma_rel) for sigma_rel in lengths]
        shadows = [{"w": steps[0].clone()} for _ in lengths]
        for step, weights in enumerate(steps.cumsum(0)):
            emajit.update_many_(shadows, {"w": weights}, step, decays=decays)
            if (step + 1) % 64 == 0:
                posthoc.save(tmp_path, shadows[:2], step + 1, sigma_rel=TRACKED)
        found = posthoc.snapshots(tmp_path)
        for sigma_rel, truth in zip(lengths[2:], shadows[2:], strict=True):
            walks = posthoc.reconstruct(found, sigma_rel, dtype=torch.float64)["w"]
            assert max(map(relative, walks, truth["w"])) < 5e-6

    def test_float16_costs_3e4(self, runs: dict[Any, Path]) -> None:
        for sigma_rel in (0.05, 0.06, 0.075, 0.09, 0.10):
            truth = average(walk(), sigma_rel)
            found = posthoc.reconstruct(posthoc.snapshots(runs["half"]), sigma_rel)
            assert 1e-5 < relative(found["w"].double(), truth) < 3e-4

    def test_more_snapshots_are_nearer(self, runs: dict[Any, Path]) -> None:
        """Twice as many divide the error by more than 8, in weights and 3 in the profile."""
        truth = average(walk(), 0.075)
        errors, profiles = [], []
        for count in (8, 16, 32, 64):
            found = posthoc.snapshots(runs[count])
            errors.append(
                relative(posthoc.reconstruct(found, 0.075, dtype=torch.float64)["w"], truth)
            )
            profiles.append(posthoc.plan(found, [0.075], None)[1][0].error)
        assert all(a > 8 * b for a, b in pairwise(errors))
        assert all(a > 3 * b for a, b in pairwise(profiles))

    def test_outside_the_span_it_says_how_far_off(self, runs: dict[Any, Path]) -> None:
        found = posthoc.snapshots(runs[64])
        for sigma_rel, error in ((0.15, 1e-5), (0.2, 1e-4), (0.03, 1e-4)):
            with pytest.warns(UserWarning, match=f"{sigma_rel} is outside of 0.050 to 0.100"):
                weights = posthoc.reconstruct(found, sigma_rel, dtype=torch.float64)["w"]
            assert relative(weights, average(walk(), sigma_rel)) < error

    @pytest.mark.parametrize("step", [64, 1024, 2048, 4000])
    def test_at_an_earlier_step(self, runs: dict[Any, Path], step: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if step in (64, 4000) else "error")
            found = posthoc.reconstruct(
                posthoc.snapshots(runs[64]), 0.07, step=step, dtype=torch.float64
            )
        bound = {64: 0.03, 1024: 2e-5, 2048: 2e-6, 4000: 0.06}[step]
        assert relative(found["w"], average(walk()[:step], 0.07)) < bound

    def test_what_was_saved_comes_back(self, runs: dict[Any, Path]) -> None:
        found = posthoc.snapshots(runs[16])
        saved = checkpoint.load(found[-1].path, {"w": torch.zeros(64).double()})[0]["w"]
        sigma_rel = posthoc.gamma_to_sigma_rel(found[-1].gamma)
        weights = posthoc.reconstruct(found, sigma_rel, dtype=torch.float64)["w"]
        assert_close(weights, saved, rtol=1e-10, atol=1e-10)

    def test_several_lengths_are_one_by_one(self, runs: dict[Any, Path]) -> None:
        found = posthoc.snapshots(runs[16])
        several = posthoc.reconstruct(found, [0.06, 0.08])
        for sigma_rel, weights in zip((0.06, 0.08), several, strict=True):
            assert torch.equal(weights["w"], posthoc.reconstruct(found, sigma_rel)["w"])
            assert weights["w"].dtype == torch.float32


class TestCoefficients:
    @pytest.mark.parametrize("sigma_rel", [0.04, 0.07, 0.15, 0.25])
    def test_quadrature(self, sigma_rel: float) -> None:
        """The least squares of the profiles themselves, on a fine grid, without inner products.

        The coefficients sum to 1 if the last is 1 less the others.
        """
        steps = [float(t) for t in (20, 40, 60, 80, 100) for _ in TRACKED]
        gammas = [16.97, 6.94] * 5
        gamma = posthoc.sigma_rel_to_gamma(sigma_rel)
        found = posthoc.solve_coefficients(steps, gammas, 100.0, gamma)
        grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 2000
        columns = [posthoc.profile(grid, t, g).numpy() for t, g in zip(steps, gammas, strict=True)]
        wanted = posthoc.profile(grid, 100.0, gamma).numpy()
        differences = np.stack(columns[:-1], 1) - columns[-1][:, None]
        others = np.linalg.lstsq(differences, wanted - columns[-1], rcond=None)[0]
        expected = np.append(others, 1 - others.sum())
        assert_close(found.coefficients, torch.from_numpy(expected), rtol=1e-3, atol=1e-5)
        distance = np.stack(columns, 1) @ expected - wanted
        assert found.error == pytest.approx(
            np.linalg.norm(distance) / np.linalg.norm(wanted), rel=1e-3
        )

    @given(st.floats(1, 1e6), st.floats(1, 1e6), st.floats(0, 100), st.floats(0, 100))
    def test_inner_products(self, t: float, u: float, g: float, h: float) -> None:
        arguments = [torch.tensor(x, dtype=torch.float64) for x in (t, g, u, h)]
        found = float(posthoc._inner(*arguments))
        nodes, weights = np.polynomial.legendre.leggauss(200)
        m = min(t, u)
        grid = torch.from_numpy((nodes + 1) * m / 2)
        product = posthoc.profile(grid, t, g) * posthoc.profile(grid, u, h)
        assert found == pytest.approx(float(product.numpy() @ weights) * m / 2, rel=1e-6, abs=1e-30)

    @given(st.floats(0.5, 1e6), st.floats(0, 100))
    def test_a_profile_weighs_one_and_has_its_width(self, step: float, gamma: float) -> None:
        nodes, weights = np.polynomial.legendre.leggauss(200)
        grid = torch.from_numpy((nodes + 1) * step / 2)
        mass = posthoc.profile(grid, step, gamma).numpy() * weights * step / 2
        assert mass.sum() == pytest.approx(1, rel=1e-6)
        mean = (mass * grid.numpy()).sum()
        width = math.sqrt((mass * (grid.numpy() - mean) ** 2).sum()) / step
        assert width == pytest.approx(posthoc.gamma_to_sigma_rel(gamma), rel=1e-5)
        assert posthoc.profile(torch.tensor([step * 1.01]), step, gamma).item() == 0

    def test_weights_that_stand_still_stay(self) -> None:
        for step in (100, 130):
            x, _ = posthoc.solve_coefficients([50, 100, 50, 100], [6.94, 6.94, 17, 17], step, 10)
            assert float(x.sum()) == pytest.approx(1, abs=1e-12)

    def test_profiles_that_are_the_same_share(self) -> None:
        x, error = posthoc.solve_coefficients([100, 100], [6.94, 6.94], 100, 6.94)
        assert_close(x, torch.tensor([0.5, 0.5], dtype=torch.float64))
        assert error < 1e-7

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (([], [], 1, 1), "at least one, found 0 and 0"),
            (([1, 2], [1], 1, 1), "found 2 and 1"),
            (([0], [1], 1, 1), "expected steps > 0"),
            (([1], [1], 1, -1), "gammas >= 0"),
            (([math.nan], [1], 1, 1), "expected steps > 0"),
            (([1], [math.inf], 1, 1), "gammas >= 0"),
        ],
    )
    def test_errors(self, arguments: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            posthoc.solve_coefficients(*arguments)


def test_lengths_and_exponents_of_the_paper() -> None:
    """arXiv 2312.02696, section 3.1: 0.05 is 16.97, 0.10 is 6.94."""
    gammas = posthoc.sigma_rel_to_gamma(torch.tensor([[0.05, 0.10]], dtype=torch.float64))
    assert gammas.dtype == torch.float64
    assert [[round(g, 2) for g in row] for row in gammas.tolist()] == [[16.97, 6.94]]
    assert_close(posthoc.gamma_to_sigma_rel(gammas), torch.tensor([[0.05, 0.10]]).double())
    assert isinstance(posthoc.sigma_rel_to_gamma(0.05), float)
    for bad in (0, -1, 0.3, math.nan):
        with pytest.raises(ValueError, match="sigma_rel: expected 0 < sigma_rel <="):
            posthoc.sigma_rel_to_gamma(bad)
    with pytest.raises(ValueError, match="gamma: expected a number >= 0, found -1"):
        posthoc.gamma_to_sigma_rel([1.0, -1.0])


def width(decays: list[float], interval: int) -> float:
    """The relative length, in training steps, of an average that is updated at each k-th one."""
    weights: list[float] = []
    for decay in decays:
        weights = [w * decay for w in weights] + [1 - decay]
    times = np.arange(1, len(decays) + 1) * interval / (len(decays) * interval)
    mean = np.average(times, weights=weights)
    return float(np.sqrt(np.average((times - mean) ** 2, weights=weights)))


@pytest.mark.parametrize("interval", [1, 10, 100])
def test_an_interval_leaves_the_length(interval: int) -> None:
    """Counted in updates. Counted in training steps, at an interval of 100, it would be 0.18."""
    power = schedules.power_function(0.10)
    sparse = schedules.every(power, interval)
    updates = 1000
    for schedule in (power, sparse):
        decays = [float(schedule(step)) for step in range(updates)]
        assert width(decays, interval) == pytest.approx(0.10, rel=0.01)
    wrong = [float(power(step * interval)) for step in range(updates)]
    assert interval == 1 or width(wrong, interval) > 0.15


class TestFiles:
    def test_the_header_tells_what_it_is(self, tmp_path: Path) -> None:
        shadow = {"a": torch.ones(2), "n": torch.tensor(3)}
        (path,) = posthoc.save(tmp_path / "new" / "run", shadow, 7, sigma_rel=0.05)
        assert path.name == "0000000007-0.05.safetensors"
        (snapshot,) = posthoc.snapshots(tmp_path / "new" / "run")
        assert snapshot == (7, posthoc.sigma_rel_to_gamma(0.05), path)
        assert checkpoint.load(path, shadow)[1] == 7

    def test_a_resumed_run_writes_its_files_again(self, tmp_path: Path) -> None:
        for value in (1.0, 2.0):
            posthoc.save(tmp_path, {"a": torch.full((2,), value)}, torch.tensor(5), sigma_rel=0.1)
        found = posthoc.snapshots(tmp_path)
        assert len(found) == 1
        assert posthoc.reconstruct(found, 0.1)["a"].tolist() == pytest.approx([2.0, 2.0])

    def test_other_files_are_left_out(self, tmp_path: Path) -> None:
        posthoc.save(tmp_path, {"a": torch.ones(2)}, 5, sigma_rel=0.1)
        checkpoint.save(tmp_path / "mine.safetensors", {"b": torch.ones(1)}, 0)
        (tmp_path / ".0000000006-0.1.safetensors.1234.part").write_bytes(b"half")
        (tmp_path / "notes.txt").write_text("")
        assert [s.step for s in posthoc.snapshots(tmp_path)] == [5]

    def test_whole_numbers_and_ties(self, tmp_path: Path) -> None:
        w = torch.ones(2)
        for step, sigma_rel in ((1, 0.05), (1, 0.1), (2, 0.05), (2, 0.1)):
            tree = {"in": w * step, "count": torch.tensor(step), "z": torch.tensor([1j]) * step}
            tree["out"] = tree["in"]
            posthoc.save(tmp_path, tree, step, sigma_rel=sigma_rel)
        found = posthoc.reconstruct(posthoc.snapshots(tmp_path), 0.1)
        assert found["in"] is found["out"]
        assert found["count"].item() == 2
        assert found["z"].dtype == torch.complex64
        assert found["z"].item() == pytest.approx(2j)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (({"a": torch.ones(1)}, 0, 0.1), "step: expected the number of updates so far, >= 1"),
            (
                ({"a": torch.ones(1)}, 1, [0.1]),
                "shadow: expected a list of 1, as sigma_rel",
            ),
            (([{"a": torch.ones(1)}], 1, [0.1, 0.2]), "expected a list of 2, .* found a list of 1"),
            (([{}, {}], 1, [0.1, 0.1]), "sigma_rel: expected different lengths"),
            (({"a": torch.ones(1)}, 1, 0.5), "sigma_rel: expected 0 < sigma_rel"),
            (({"a": torch.ones(1) * 1e6}, 1, 0.1), r"shadow\['a'\]: expected numbers up to 65504"),
            (({"a": torch.ones(1)}, 1, 1e-200), "sigma_rel: expected 0 < sigma_rel"),
        ],
    )
    def test_what_cannot_be_saved(self, tmp_path: Path, arguments: Any, message: str) -> None:
        shadow, step, sigma_rel = arguments
        with pytest.raises(ValueError, match=message):
            posthoc.save(tmp_path / "run", shadow, step, sigma_rel=sigma_rel, dtype=torch.float16)
        assert not (tmp_path / "run").exists()

    def test_the_second_of_two(self, tmp_path: Path) -> None:
        shadows = [{"a": torch.ones(1)}, {"a": torch.ones(1) * 1e6}]
        with pytest.raises(ValueError, match=r"shadow\[1\]\['a'\]: expected numbers up to 65504"):
            posthoc.save(tmp_path, shadows, 1, sigma_rel=[0.1, 0.2], dtype=torch.float16)
        assert not [*tmp_path.iterdir()]

    def test_folders(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            posthoc.snapshots(tmp_path / "nowhere")
        assert posthoc.snapshots(tmp_path) == []
        with pytest.raises(ValueError, match="snapshots: expected some of emajit"):
            posthoc.reconstruct([], 0.1)


class TestArguments:
    def test_types(self, tmp_path: Path) -> None:
        shadow = {"w": torch.ones(1)}
        lengths: Any = torch.tensor([0.05, 0.2]).double()
        number: Any = np.float32(0.1)
        posthoc.save(tmp_path, shadow, 1, sigma_rel=number)
        posthoc.save(tmp_path, [shadow, shadow], 1, sigma_rel=lengths)
        lengths = np.array([0.06, 0.07])
        posthoc.save(tmp_path, [shadow, shadow], 1, sigma_rel=lengths)
        assert len(posthoc.snapshots(tmp_path)) == 5
        found: Any = posthoc.snapshots(tmp_path)
        wrong: Any
        for wrong in ("0.1", None, [[0.1]], ["0.1"]):
            with pytest.raises(TypeError, match="sigma_rel: expected a number, or a list of numb"):
                posthoc.reconstruct(found, wrong)
        whole = posthoc.reconstruct(found, 0.1)
        length: Any = torch.tensor(0.1)
        listed: Any = iter(found)
        assert posthoc.reconstruct(listed, length) == whole
        for wrong in (str(tmp_path), [tmp_path], None):
            with pytest.raises(TypeError, match="snapshots: expected a list from posthoc"):
                posthoc.reconstruct(wrong, 0.1)
        wrong = "1"
        with pytest.raises(TypeError, match="step: expected an int or a 0-d integer tensor, found"):
            posthoc.reconstruct(found, 0.1, step=wrong)
        for wrong in (torch.int64, "float16"):
            with pytest.raises(ValueError, match="dtype: expected a floating-point dtype such as"):
                posthoc.reconstruct(found, 0.1, dtype=wrong)
        with pytest.raises(ValueError, match="sigma_rel: expected a list of 2, as shadow, found o"):
            posthoc.save(tmp_path, [shadow, shadow], 1, sigma_rel=0.1)


class TestTrouble:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        train(tmp_path, 8, steps=64)
        return tmp_path

    @pytest.mark.parametrize("step", [7, 65])
    def test_a_step_that_the_run_did_not_have(self, folder: Path, step: int) -> None:
        with pytest.raises(
            ValueError, match="step: expected one from 8 to 64, the first and the last"
        ):
            posthoc.reconstruct(posthoc.snapshots(folder), 0.07, step=step)

    def test_a_missing_one(self, folder: Path) -> None:
        found = posthoc.snapshots(folder)
        with pytest.warns(UserWarning, match="expected 2 lengths at each step, some lack at 16"):
            posthoc.reconstruct([found[0], found[1], *found[3:]], 0.07)

    def test_too_few(self, folder: Path) -> None:
        told = (
            r"0\.07 is within .*: the expected error is 0\.\d+ .*; step 60 was not saved, but 56 "
        )
        with pytest.warns(UserWarning, match=told):
            posthoc.reconstruct(posthoc.snapshots(folder), 0.07, step=60)

    def test_rounding_that_is_multiplied(self, tmp_path: Path) -> None:
        lengths = [0.1, 0.1005]
        shadows = [{"w": torch.ones(3)}, {"w": torch.ones(3)}]
        for step in (10, 20):
            posthoc.save(tmp_path, shadows, step, sigma_rel=lengths, dtype=torch.bfloat16)
        with pytest.warns(UserWarning, match=r"and \d\.\d+ of each weight from the rounding"):
            posthoc.reconstruct(posthoc.snapshots(tmp_path), 0.09)

    def test_ties_that_differ(self, tmp_path: Path) -> None:
        w = torch.ones(1)
        posthoc.save(tmp_path, {"a": torch.ones(1), "b": torch.zeros(1)}, 1, sigma_rel=0.1)
        posthoc.save(tmp_path, {"a": w, "b": w}, 2, sigma_rel=0.1)
        with pytest.raises(ValueError, match="expected the ties of"):
            posthoc.reconstruct(posthoc.snapshots(tmp_path), 0.1)

    def test_of_two_runs(self, folder: Path) -> None:
        train(folder, 4, steps=32)
        with pytest.warns(UserWarning, match="snapshots: .*040.* is older than .*032.*: of anoth"):
            posthoc.reconstruct(posthoc.snapshots(folder), 0.07)

    def test_of_two_runs_with_a_length_in_common(self, tmp_path: Path) -> None:
        """The later run replaces the files of that length, so that they are newer than all."""
        for seconds, lengths in ((0, (0.05, 0.1)), (100, (0.05, 0.15))):
            for step in (8, 16, 24):
                paths = posthoc.save(tmp_path, [{"w": torch.ones(1)}] * 2, step, sigma_rel=lengths)
                for path in paths:
                    os.utime(path, (0, seconds + step))
        with pytest.warns(UserWarning, match="snapshots: .*016.* is older than .*008.*: of anoth"):
            posthoc.reconstruct(posthoc.snapshots(tmp_path), 0.08)

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
    def test_in_eight_bits(self, tmp_path: Path, dtype: torch.dtype) -> None:
        for step in (8, 16):
            posthoc.save(tmp_path, {"w": torch.ones(3)}, step, sigma_rel=0.1, dtype=dtype)
        with pytest.warns(UserWarning, match="from the rounding of the files"):
            found = posthoc.reconstruct(posthoc.snapshots(tmp_path), 0.1)
        assert_close(found["w"], torch.ones(3))

    def test_a_result_that_overflows(self, tmp_path: Path) -> None:
        for step in (1, 2):
            posthoc.save(tmp_path, {"v": torch.tensor([1e6])}, step, sigma_rel=0.1)
        with pytest.raises(ValueError, match="'v': expected numbers up to 65504, found"):
            posthoc.reconstruct(posthoc.snapshots(tmp_path), 0.1, dtype=torch.float16)

    @pytest.mark.parametrize(
        ("dtype", "fits", "over"),
        [
            (torch.float8_e4m3fn, [449.0, -463.9, math.nan], [464.1, -1e30, math.inf]),
            (torch.float8_e5m2, [61439.0, math.inf, -math.inf], [61440.0, -1e30]),
            (torch.float16, [65519.0, math.inf, math.nan], [65520.0, -1e30]),
            (torch.bfloat16, [3.39e38, math.inf], [3.4e38, -3.4e38]),
        ],
    )
    def test_a_number_that_overflows_in_a_file(
        self, tmp_path: Path, dtype: torch.dtype, fits: list[float], over: list[float]
    ) -> None:
        for i, number in enumerate(fits):
            weights = {"w": torch.tensor([number, 1.0])}
            (path,) = posthoc.save(tmp_path, weights, i + 1, sigma_rel=0.1, dtype=dtype)
            found = checkpoint.read(path).weights["w"]
            assert_close(found.float(), weights["w"].to(dtype).float(), equal_nan=True)
        for number in over:
            with pytest.raises(ValueError, match=r"expected numbers up to .*, found a larger"):
                posthoc.save(
                    tmp_path, {"w": torch.tensor([1.0, number])}, 9, sigma_rel=0.1, dtype=dtype
                )

    @pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
    def test_complex_numbers_in_half_precision(self, tmp_path: Path) -> None:
        for step in (4, 8):
            shadow = {"w": torch.full((2,), 1 + 2j)}
            posthoc.save(tmp_path, [shadow, shadow], step, sigma_rel=TRACKED)
        found = posthoc.reconstruct(posthoc.snapshots(tmp_path), 0.07, dtype=torch.float16)["w"]
        assert found.dtype == torch.complex32
        assert found.to(torch.complex64).tolist() == [1 + 2j] * 2

    @pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
    @pytest.mark.parametrize("number", [70000 + 1j, 1 + 70000j])
    def test_a_complex_number_beyond_half_precision_is_refused(
        self, tmp_path: Path, number: complex
    ) -> None:
        for step in (4, 8):
            shadow = {"w": torch.tensor([1, number, 2j])}
            posthoc.save(tmp_path, [shadow, shadow], step, sigma_rel=TRACKED)
        with pytest.raises(ValueError, match="'w': expected numbers up to 65504, found a larger"):
            posthoc.reconstruct(posthoc.snapshots(tmp_path), 0.07, dtype=torch.float16)

    def test_what_has_no_fraction_is_not_the_file(self, tmp_path: Path) -> None:
        def write(count: int) -> None:
            posthoc.save(tmp_path, {"count": torch.tensor(count)}, 8, sigma_rel=0.1)

        write(3)
        found = posthoc.reconstruct(posthoc.snapshots(tmp_path), 0.1)
        (path,) = tmp_path.iterdir()
        whole = bytearray(path.read_bytes())
        whole[-8:] = bytes(8)
        with path.open("r+b") as file:  # the same file, which is mapped
            file.write(whole)
        assert found["count"] == 3

    def test_another_dtype_is_refused(self, tmp_path: Path) -> None:
        wrong: Any
        for wrong in ("float16", torch.int8):
            with pytest.raises(ValueError, match="dtype: expected a floating-point dtype such as"):
                posthoc.save(tmp_path, {"w": torch.ones(1)}, 8, sigma_rel=0.1, dtype=wrong)

    def test_infinite_elements_are_those_of_the_last(self, tmp_path: Path) -> None:
        for step in (5, 10, 20):
            trees = [{"mask": torch.tensor([0.0, -math.inf])}] * 2
            posthoc.save(tmp_path, trees, step, sigma_rel=TRACKED)
        found = posthoc.reconstruct(posthoc.snapshots(tmp_path), 0.07)
        assert found["mask"].tolist() == [0.0, -math.inf]

    def test_a_header_that_is_no_number(self, tmp_path: Path) -> None:
        path = tmp_path / "1.safetensors"
        checkpoint.save(path, {"w": torch.ones(1)}, 1, metadata={"posthoc.gamma": "many"})
        with pytest.raises(ValueError, match=f"^{path}: expected a gamma, found 'many'"):
            posthoc.snapshots(tmp_path)

    def test_twice_the_same(self, folder: Path) -> None:
        found = posthoc.snapshots(folder)
        with pytest.raises(ValueError, match="expected one snapshot of each, found"):
            posthoc.reconstruct([*found, found[3]], 0.07)

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            ({"v": torch.ones(64).double()}, "expected the leaves of .*, found another at v, w"),
            ({"w": torch.ones(3).double()}, r"'w': expected \(64,\) in torch.float64 as in"),
            ({"w": torch.ones(64)}, r"found \(64,\) in torch.float32"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:.* is older than")
    def test_of_another_model(self, folder: Path, other: Any, message: str) -> None:
        (path,) = posthoc.save(folder, other, 30, sigma_rel=0.05)
        with (
            pytest.raises(ValueError, match=f"^{path}: .*{message}"),
            pytest.warns(UserWarning, match="some lack at 30"),
        ):
            posthoc.reconstruct(posthoc.snapshots(folder), 0.07)

    @pytest.mark.filterwarnings("ignore:.* is older than")
    def test_a_corrupt_one(self, folder: Path) -> None:
        path = posthoc.snapshots(folder)[5].path
        whole = bytearray(path.read_bytes())
        whole[-1] ^= 1
        path.write_bytes(whole)
        with pytest.raises(ValueError, match=f"^{path}: 'w' is corrupt"):
            posthoc.reconstruct(posthoc.snapshots(folder), 0.07)
        path.write_bytes(whole[:-1])
        with pytest.raises(ValueError, match=f"^{path}: expected a whole safetensors file"):
            posthoc.snapshots(folder)


@tells_memory
def test_memory_does_not_grow_with_the_snapshots(tmp_path: Path) -> None:
    """8 MB of weights, 400 MB of snapshots: in memory are the result and a leaf or two."""
    weights = {f"{i}": torch.full((2**18,), float(i)) for i in range(8)}
    for step in range(1, 26):
        posthoc.save(tmp_path, [weights, weights], step, sigma_rel=TRACKED)
    found = posthoc.snapshots(tmp_path)
    chosen, solutions = posthoc.plan(found, [0.07], None)
    peaks, before = [], own_memory()
    (result,) = posthoc.summed(
        chosen, solutions, torch.float32, lambda _: peaks.append(own_memory() - before)
    )
    assert len(peaks) == len(weights)
    assert max(peaks) < 3 * 8 * 2**20  # what is freed is not all returned to the system
    assert_close(result["7"], weights["7"])
