"""Distillation for every kind of output, stopped and gone on with, and on several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from outrider_exporters import Data, Distill, Prune
from outrider_exporters.passes import run_passes
from outrider_exporters.passes.checkpoint import Checkpoint, fingerprint
from outrider_exporters.passes.losses import (
    Head,
    check_targets,
    distillation_loss,
    head_of,
    looks_like_probabilities,
)
from outrider_exporters.passes.team import Team, team_here
from outrider_exporters.sources.module import torch_predict
from outrider_runtimes.errors import ConfigError, ExportError
from outrider_runtimes.tensors import TensorSpec
from support.distilling import EPOCHS, bench
from support.exporters import fit, state_of, workshop

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]


# --- heads


def spec(shape, axes):
    return TensorSpec(name="y", dtype="float32", shape=shape, axes=axes)


@pytest.mark.parametrize(
    ("shape", "axes", "targets", "head"),
    [
        ((None, 10), "NC", np.zeros(4, int), Head(kind="classes", axis=1)),
        ((None, 7, 10), "NAB", np.zeros((4, 7), int), Head(kind="classes", axis=2)),
        ((None, 10, 8, 8), "NCHW", np.zeros((4, 8, 8), int), Head(kind="classes", axis=1)),
        ((None, 8, 8, 8), "NCHW", np.zeros((4, 8, 8), int), Head(kind="classes", axis=1)),
        ((None, 1), "NC", np.zeros(4, int), Head(kind="binary")),
        ((None,), "N", np.zeros(4, int), Head(kind="binary")),
        ((None, 5), "NC", np.zeros((4, 5), int), Head(kind="binary")),
        ((None, 1), "NC", np.zeros(4, np.float32), Head(kind="values")),
        ((None, 640), "NC", np.zeros((4, 640), np.float32), Head(kind="values")),
    ],
)
def test_what_an_output_is_follows_from_the_targets(shape, axes, targets, head):
    assert head_of(spec(shape, axes), targets) == head


@pytest.mark.parametrize(
    "targets", [np.zeros((4, 3), np.float32), np.zeros((4, 2, 2), int), np.eye(10)[:4], np.eye(10, dtype=int)[:4]]
)
def test_targets_that_do_not_belong_to_the_output_are_refused(targets):
    with pytest.raises(ConfigError, match="do not belong together"):
        head_of(spec((None, 10), "NC"), targets)


def test_probabilities_are_recognised():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(50, 4)).astype(np.float32)
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    assert looks_like_probabilities(Head(kind="classes"), shares)
    assert not looks_like_probabilities(Head(kind="classes"), scores)
    assert not looks_like_probabilities(Head(kind="classes"), shares / 2)
    assert looks_like_probabilities(Head(kind="binary"), shares[:, :1])
    assert not looks_like_probabilities(Head(kind="values"), shares)


@pytest.mark.parametrize("axis", [1, 2])
def test_every_place_counts_alike(axis):
    torch.manual_seed(0)
    student, teacher, targets = torch.randn(3, 5, 4), torch.randn(3, 5, 4), torch.randint(0, 4, (3, 5))
    options = {"temperature": 2.0, "alpha": 0.3}
    flat = distillation_loss(
        Head(kind="classes"), student.flatten(0, 1), teacher.flatten(0, 1), targets.flatten(), **options
    )
    moved = [x.movedim(-1, axis) for x in (student, teacher)]
    assert float(distillation_loss(Head(kind="classes", axis=axis), *moved, targets, **options)) == pytest.approx(
        float(flat), rel=1e-6
    )


def test_a_binary_score_is_two_classes():
    student, teacher, targets = (
        torch.tensor([[0.3], [-2.0]]),
        torch.tensor([[1.5], [0.1]]),
        torch.tensor([[1.0], [0.0]]),
    )
    options = {"temperature": 3.0, "alpha": 0.6}
    binary = distillation_loss(Head(kind="binary"), student, teacher, targets, **options)
    both = [torch.cat([torch.zeros_like(x), x], 1) for x in (student, teacher)]
    classes = distillation_loss(Head(kind="classes"), *both, targets[:, 0].long(), **options)
    assert float(binary) == pytest.approx(float(classes), rel=1e-5)
    through = distillation_loss(
        Head(kind="binary", probabilities=True), student.sigmoid(), teacher.sigmoid(), targets, **options
    )
    assert float(through) == pytest.approx(float(binary), rel=1e-4)


def test_probabilities_and_scores_teach_the_same():
    torch.manual_seed(0)
    student, teacher, targets = torch.randn(6, 4), torch.randn(6, 4), torch.randint(0, 4, (6,))
    options = {"temperature": 4.0, "alpha": 0.5}
    scores = distillation_loss(Head(kind="classes"), student, teacher, targets, **options)
    shares = distillation_loss(
        Head(kind="classes", probabilities=True), student.softmax(-1), teacher.softmax(-1), targets, **options
    )
    assert float(shares) == pytest.approx(float(scores), rel=1e-4)


def test_numbers_learn_by_the_mean_square():
    student, teacher, targets = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.0]), torch.tensor([0.0, 2.0])
    loss = distillation_loss(Head(kind="values"), student, teacher, targets, temperature=9.0, alpha=0.25)
    assert float(loss) == pytest.approx(0.25 * 0.125 + 0.75 * 0.5)


def test_targets_that_name_no_class_are_refused():
    scores = np.zeros((3, 4), np.float32)
    with pytest.raises(ConfigError, match="targets 0 to 4, the network 4 classes"):
        check_targets(Head(kind="classes"), scores, np.array([0, 4, 1]))
    with pytest.raises(ConfigError, match="targets -1 to 1, the network 2 classes"):
        check_targets(Head(kind="binary"), scores[:, :1], np.array([0, -1, 1]))


class Curve(nn.Module):
    """image: float32 [N, 1, 8, 8] -> logits: float32 [N, 1], by way of ``last``."""

    def __init__(self, width: int, last: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 1), last)

    def forward(self, image):
        return self.layers(image)


@pytest.mark.parametrize(
    ("kind", "last"), [("values", nn.Identity()), ("binary", nn.Identity()), ("binary", nn.Sigmoid())]
)
def test_a_student_learns_numbers_and_yes_or_no_from_its_teacher(kind, last):
    torch.manual_seed(1)
    rng = np.random.default_rng(0)
    inputs = {"image": rng.normal(size=(256, 1, 8, 8)).astype(np.float32)}
    targets = rng.normal(size=256).astype(np.float32) if kind == "values" else rng.integers(0, 2, 256)
    data = Data(train=(inputs, targets), test=(inputs, targets))
    teacher = Curve(8, last)
    network, context = workshop(Curve(16, last), data, teacher=teacher)
    wanted = torch_predict(teacher, context.interface)(inputs)["logits"]

    def distance():
        return float(np.abs(torch_predict(network.module, context.interface)(inputs)["logits"] - wanted).mean())

    before = distance()
    detail = Distill(alpha=1.0, epochs=20, learning_rate=1e-2).call(network, context)
    assert distance() < 0.4 * before
    assert detail["head"] == kind


def test_probabilities_in_one_network_only_are_refused():
    inputs = {"image": np.random.default_rng(0).normal(size=(16, 1, 8, 8)).astype(np.float32)}
    data = Data(train=(inputs, np.zeros(16, int)), test=(inputs, 0))
    network, context = workshop(Curve(4, nn.Identity()), data, teacher=Curve(4, nn.Sigmoid()))
    with pytest.raises(ConfigError, match="probabilities in one of teacher and network only"):
        Distill(epochs=1).call(network, context)


# --- stopped and gone on with


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def uninterrupted():
    network, context = bench()
    Distill(epochs=EPOCHS, batch_size=31).call(network, context)
    return state_of(network)


def stopping_after(epoch):
    def progress(event):
        if event.step == "distill" and event.done == epoch:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("epoch", [1, 3, EPOCHS])
def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path, epoch):
    config = Distill(epochs=EPOCHS, batch_size=31, checkpoint=str(tmp_path / "deep" / "here"))
    network, context = bench(progress=stopping_after(epoch))
    with pytest.raises(KeyboardInterrupt):
        config.call(network, context)
    network, context = bench()
    detail = config.call(network, context)
    assert detail["resumed_after_epoch"] == epoch
    assert_same(state_of(network), uninterrupted())


def test_a_training_stopped_inside_an_epoch_repeats_that_epoch(tmp_path):
    config = Distill(epochs=EPOCHS, batch_size=31, checkpoint=str(tmp_path))
    network, context = bench()
    runs = iter(range(100))

    def stop(*_):
        if network.training and next(runs) == 7:
            raise KeyboardInterrupt

    hook = network.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        config.call(network, context)
    hook.remove()
    network, context = bench()
    assert config.call(network, context)["resumed_after_epoch"] == 2
    assert_same(state_of(network), uninterrupted())


def test_a_recipe_that_prunes_first_goes_on_too(tmp_path):
    passes = [Prune(ratio=0.5, round_to=4), Distill(epochs=EPOCHS, checkpoint=str(tmp_path))]
    results = []
    for progress in (stopping_after(2), lambda event: None):
        network, context = bench(progress=progress, fit=lambda model, train: fit(model, train, 1))
        try:
            results.append(run_passes(network, passes, context, lambda model, what: {"m": 1.0})[-1])
        except KeyboardInterrupt:
            continue
    assert [stage.detail["resumed_after_epoch"] for stage in results] == [2]


def test_a_finished_training_is_not_repeated_and_another_one_is_not_taken_for_it(tmp_path):
    config = Distill(epochs=2, checkpoint=str(tmp_path))
    network, context = bench()
    config.call(network, context)
    again, context = bench()
    assert config.call(again, context)["resumed_after_epoch"] == 2
    assert_same(state_of(again), state_of(network))
    (file,) = tmp_path.iterdir()
    other, context = bench()
    assert Distill(epochs=3, checkpoint=str(tmp_path)).call(other, context)["resumed_after_epoch"] == 0
    assert config.call(other, context)["resumed_after_epoch"] == 0
    assert len(list(tmp_path.iterdir())) == 3
    file.write_bytes(file.read_bytes()[:100])
    fresh, context = bench()
    with pytest.raises(ConfigError, match="cannot be read"):
        config.call(fresh, context)


def test_a_checkpoint_that_cannot_be_written_stops_the_pass(tmp_path):
    (tmp_path / "file").write_text("")
    network, context = bench()
    with pytest.raises(ExportError, match=r"checkpoint .* cannot be written"):
        Distill(epochs=1, checkpoint=str(tmp_path / "file" / "below")).call(network, context)


def test_a_checkpoint_that_is_no_folder_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    _, context = bench()
    with pytest.raises(ConfigError, match="is not a folder"):
        Distill(checkpoint=str(tmp_path / "file")).requires(context)
    Distill(checkpoint=str(tmp_path / "not yet")).requires(context)


def test_a_checkpoint_reads_tensors_and_runs_nothing(tmp_path):
    class Canary:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    place = Checkpoint(tmp_path, "distill", "0" * 64)
    assert place.load() is None
    torch.save({"network": Canary()}, place.path)
    with pytest.raises(ConfigError, match="cannot be read"):
        place.load()
    assert not (tmp_path / "ran").exists()


def test_a_fingerprint_is_of_words_arrays_and_weights():
    torch.manual_seed(0)
    network, array = nn.Linear(2, 2), np.arange(4.0)
    prints = {fingerprint(["a"], [array], network), fingerprint(["b"], [array], network)}
    prints |= {fingerprint(["a"], [array.astype(np.float32)], network), fingerprint(["a"], [array[:2]], network)}
    with torch.no_grad():
        network.weight[0, 0] += 1.0
    assert len(prints | {fingerprint(["a"], [array], network)}) == 5


def child(*arguments, launcher=()):
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    program = TESTS / "support" / "distilling.py"
    return subprocess.Popen(
        [sys.executable, *launcher, str(program), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def test_ctrl_c_and_the_same_command_again(tmp_path):
    process = child(tmp_path / "kept", tmp_path / "out.pt", 2)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 2"):
            process.send_signal(signal.SIGINT)
            break
    process.communicate(timeout=250)
    assert process.returncode != 0
    assert not (tmp_path / "out.pt").exists()
    network, context = bench()
    detail = Distill(epochs=EPOCHS, batch_size=31, checkpoint=str(tmp_path / "kept")).call(network, context)
    assert detail["resumed_after_epoch"] == 2
    # The child had one thread; this process may have more, and sums in another order.
    for name, tensor in uninterrupted().items():
        torch.testing.assert_close(network.state_dict()[name], tensor, rtol=1e-5, atol=1e-5)


# --- on several processes


def test_two_processes_reach_the_weights_of_one(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = child(tmp_path / "twice", tmp_path / "out.pt", launcher=launcher)
    try:
        _, errors = process.communicate(timeout=280)
    finally:
        process.terminate()  # torchrun ends its children
    assert process.returncode == 0, errors
    saved = torch.load(tmp_path / "out.pt", weights_only=True)
    assert saved["detail"]["processes"] == 2
    network, context = bench()
    for _ in range(2):
        Distill(epochs=EPOCHS, batch_size=31).call(network, context)
    assert saved["network"].keys() == network.state_dict().keys()
    differences = {n: float((saved["network"][n] - t).abs().max()) for n, t in network.state_dict().items()}
    assert max(differences.values()) <= 1e-5, differences


def test_one_process_alone_is_a_team():
    team = team_here()
    assert team == Team()
    tensor = torch.ones(2)
    team.add([tensor])
    assert tensor.tolist() == [1.0, 1.0]
    assert team.same({"a": 1}) == {"a": 1}
    assert team.part(np.arange(5)).tolist() == [0, 1, 2, 3, 4]


def test_the_parts_of_a_batch_are_the_batch():
    parts = [Team(rank=rank, size=3).part(np.arange(8)) for rank in range(3)]
    assert np.concatenate(parts).tolist() == list(range(8))
    assert {len(part) for part in parts} == {2, 3}
    with pytest.raises(ConfigError, match="a batch has 2 rows, 3 processes train"):
        Team(rank=0, size=3).check_batch(2)
