"""The optimizer, the schedule, the batches and the training step."""

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR

from models.convnet import build_conv_classifier
from models.device import resolve_device
from models.errors import DeviceError, RecipeError, TrainingDivergedError
from models.loader import OrderedBatches, ShuffledBatches
from models.optimization import build_one_cycle, build_optimizer
from models.reproducibility import reproducible
from models.trainer import Trainer

CPU = torch.device("cpu")


class MixedModel(nn.Module):
    """Every kind of parameter, under names that say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(4)
        self.a = nn.BatchNorm2d(4)
        self.b = nn.GroupNorm(2, 4)
        self.c = nn.RMSNorm(4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.embedding = nn.Embedding(3, 4)
        self.head = nn.Linear(4, 2)


def make_trainer(model: nn.Module, *, learning_rate: float = 0.1, max_grad_norm: float = 1e9) -> Trainer:
    optimizer = SGD(model.parameters(), lr=learning_rate)
    return Trainer(
        model,
        optimizer=optimizer,
        scheduler=ConstantLR(optimizer, factor=1.0),
        max_grad_norm=max_grad_norm,
        device=CPU,
    )


def test_weights_decay_and_biases_and_norms_do_not() -> None:
    model = MixedModel()
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    optimizer = build_optimizer(model, learning_rate=0.1, weight_decay=0.5)

    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {
        "layer_norm1.weight": 0,
        "layer_norm1.bias": 0,
        "a.weight": 0,
        "a.bias": 0,
        "b.weight": 0,
        "b.bias": 0,
        "c.weight": 0,
        "attention.in_proj_weight": 0.5,
        "attention.in_proj_bias": 0,
        "attention.out_proj.weight": 0.5,
        "attention.out_proj.bias": 0,
        "embedding.weight": 0.5,
        "head.weight": 0.5,
        "head.bias": 0,
    }


def test_decay_shrinks_a_weight_without_gradient_and_leaves_its_norm() -> None:
    model = build_conv_classifier(in_channels=1, num_classes=2, widths=[2])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, learning_rate=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    optimizer.step()

    after = dict(model.named_parameters())
    torch.testing.assert_close(after["classifier.weight"], before["classifier.weight"] * 0.95)
    torch.testing.assert_close(after["features.0.bn.weight"], before["features.0.bn.weight"], rtol=0, atol=0)


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)

    optimizer = build_optimizer(model, learning_rate=0.1, weight_decay=0.5)

    assert [p is model.bias for group in optimizer.param_groups for p in group["params"]] == [True]


@pytest.mark.parametrize(("total_steps", "warmup_fraction"), [(4, 0.25), (4, 0.01), (40, 0.25), (8, 0.9)])
def test_one_cycle_rises_to_the_peak_and_falls_to_almost_zero(total_steps: int, warmup_fraction: float) -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), learning_rate=0.1, weight_decay=0.0)
    scheduler = build_one_cycle(
        optimizer, max_learning_rate=0.1, total_steps=total_steps, warmup_fraction=warmup_fraction
    )
    rates = []
    for _ in range(total_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()

    peak = rates.index(max(rates))
    assert rates[0] == pytest.approx(0.004)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 1e-5
    assert peak == pytest.approx(max(warmup_fraction * total_steps, 2) - 1, abs=1)


def test_too_few_steps_for_a_cycle_is_an_error() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), learning_rate=0.1, weight_decay=0.0)

    with pytest.raises(RecipeError, match="The training has 3 steps and needs at least 4"):
        build_one_cycle(optimizer, max_learning_rate=0.1, total_steps=3, warmup_fraction=0.3)


def test_shuffled_batches_drop_only_the_incomplete_one() -> None:
    samples = torch.arange(10)
    batches = ShuffledBatches(samples * 10, samples, batch_size=4, seed=0)

    first, second = list(batches), list(batches)

    assert len(batches) == len(first) == 2
    for inputs, labels in first:
        assert inputs.tolist() == (labels * 10).tolist()
    seen = torch.cat([labels for _, labels in first]).tolist()
    assert len(set(seen)) == 8
    assert seen != torch.cat([labels for _, labels in second]).tolist()


def test_shuffling_depends_on_its_seed_alone_and_continues_from_its_state() -> None:
    def order(batches: ShuffledBatches) -> list[int]:
        return torch.cat([labels for _, labels in batches]).tolist()

    data = torch.arange(50)
    torch.manual_seed(0)
    batches = ShuffledBatches(data, data, batch_size=10, seed=3)
    first = order(batches)
    state = batches.state_dict()
    second = order(batches)

    torch.manual_seed(1)
    other = ShuffledBatches(data, data, batch_size=10, seed=3)
    assert order(other) == first
    restored = ShuffledBatches(data, data, batch_size=10, seed=99)
    restored.load_state_dict(state)
    assert order(restored) == second


def test_ordered_batches_hold_every_sample_once() -> None:
    data = torch.arange(10)
    batches = OrderedBatches(data, data, batch_size=4)

    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert len(batches) == 3
    assert torch.cat([inputs for inputs, _ in batches]).tolist() == data.tolist()


def test_training_lowers_the_loss_and_evaluation_measures_it() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(64, 2)
    batches = OrderedBatches(inputs, (inputs[:, 0] > 0).long(), batch_size=24)
    trainer = make_trainer(nn.Linear(2, 2), learning_rate=1.0)
    before = trainer.evaluate(batches)

    metrics = [trainer.train_epoch(batches) for _ in range(20)]
    after = trainer.evaluate(batches)

    assert trainer.steps == 60
    assert after.loss < 0.3 * before.loss
    assert metrics[-1].loss == pytest.approx(after.loss, rel=0.1)
    assert metrics[-1].learning_rate == 1.0
    assert after.accuracy > 0.95
    assert after.samples == 64
    logits = trainer.model(inputs)
    labels = (inputs[:, 0] > 0).long()
    assert after.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert after.accuracy == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def test_evaluation_changes_nothing() -> None:
    model = build_conv_classifier(in_channels=1, num_classes=2, widths=[2], dropout=0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = OrderedBatches(torch.randn(8, 1, 4, 4), torch.zeros(8, dtype=torch.int64), batch_size=4)
    trainer = make_trainer(model)

    assert trainer.evaluate(batches) == trainer.evaluate(batches)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_gradient_is_clipped_and_its_norm_before_that_is_reported() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone(), model.bias.detach().clone()
    batches = [(torch.tensor([[1000.0, 0.0]]), torch.tensor([int(model(torch.tensor([[1000.0, 0.0]])).argmin())]))]

    metrics = make_trainer(model, learning_rate=1.0, max_grad_norm=0.25).train_epoch(batches)

    moved = torch.cat([(model.weight - before[0]).flatten(), model.bias - before[1]]).norm()
    assert metrics.grad_norm > 100
    assert moved.item() == pytest.approx(0.25, rel=1e-3)


def test_a_loss_that_is_not_a_number_stops_before_the_step() -> None:
    model = nn.Linear(1, 2)
    good = (torch.ones(2, 1), torch.tensor([0, 1]))
    bad = (torch.tensor([[float("nan")], [1.0]]), torch.tensor([0, 1]))
    trainer = make_trainer(model, learning_rate=0.125)

    with pytest.raises(TrainingDivergedError, match=r"loss became nan at step 3, with a learning rate of 0\.125"):
        trainer.train_epoch([good, good, bad, good])

    assert trainer.steps == 2
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_an_infinite_gradient_stops_before_the_step() -> None:
    class Spike(nn.Module):
        """A finite loss with an infinite slope: the square root at zero."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight.sqrt()

    trainer = make_trainer(Spike())

    with pytest.raises(TrainingDivergedError, match=r"gradient norm became (inf|nan) at step 1"):
        trainer.train_epoch([(torch.ones(2, 1), torch.tensor([0, 0]))])

    assert not trainer.model.weight.any()


def test_reproducible_seeds_and_puts_everything_back() -> None:
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    draws = []
    for _ in range(2):
        with reproducible(1, CPU, threads=threads + 1):
            draws.append(torch.rand(3))
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.get_num_threads() == threads + 1

    assert torch.equal(draws[0], draws[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_device_that_is_absent_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert resolve_device("auto") == CPU
    with pytest.raises(DeviceError, match=r"use -s trainer\.device=cpu"):
        resolve_device("cuda")
