"""The optimizer, the schedules and the training step."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ConstantLR

from models.batch import Batch
from models.convnet import build_conv_classifier
from models.device import resolve_device
from models.errors import DeviceError, RecipeError, TrainingDivergedError
from models.optimization import build_one_cycle, build_optimizer, build_scheduler, build_warmup_cosine
from models.reproducibility import reproducible
from models.trainer import StepMetrics, Trainer

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


def make_trainer(
    model: nn.Module,
    *,
    learning_rate: float = 0.1,
    max_grad_norm: float = 1e9,
    optimizer_type: type[Optimizer] = SGD,
    **options: Any,
) -> Trainer:
    optimizer = optimizer_type(model.parameters(), lr=learning_rate)
    return Trainer(
        model,
        optimizer=optimizer,
        scheduler=ConstantLR(optimizer, factor=1.0),
        max_grad_norm=max_grad_norm,
        device=CPU,
        **options,
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


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(2),
        nn.BatchNorm2d(2),
        nn.BatchNorm3d(2),
        nn.SyncBatchNorm(2),
        nn.InstanceNorm1d(2, affine=True),
        nn.InstanceNorm2d(2, affine=True),
        nn.InstanceNorm3d(2, affine=True),
        nn.LayerNorm(2),
        nn.GroupNorm(1, 2),
        nn.RMSNorm(2),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_no_parameter_of_any_norm_decays(norm: nn.Module) -> None:
    groups = build_optimizer(norm, learning_rate=0.1, weight_decay=0.5).param_groups

    assert [group["weight_decay"] for group in groups] == [0]
    assert len(groups[0]["params"]) == len(list(norm.parameters())) > 0


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


@pytest.mark.parametrize("total_steps", [1, 2, 40])
def test_warmup_cosine_rises_in_a_line_and_falls_to_zero(total_steps: int) -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), learning_rate=0.5, weight_decay=0.0)
    scheduler = build_warmup_cosine(optimizer, max_learning_rate=0.1, total_steps=total_steps, warmup_fraction=0.25)
    rates = []
    for _ in range(total_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()

    warmup = max(1, total_steps // 4)
    assert rates[:warmup] == pytest.approx([0.1 * (step + 1) / warmup for step in range(warmup)])
    assert rates[warmup - 1 :] == sorted(rates[warmup - 1 :], reverse=True)
    if total_steps == 40:
        assert rates[-1] < 0.001


def test_a_schedule_is_built_by_its_name() -> None:
    for name, kind in (("one_cycle", "OneCycleLR"), ("warmup_cosine", "LambdaLR")):
        optimizer = build_optimizer(nn.Linear(2, 2), learning_rate=0.1, weight_decay=0.0)
        schedule = build_scheduler(name, optimizer, max_learning_rate=0.1, total_steps=10, warmup_fraction=0.2)
        assert type(schedule).__name__ == kind


class Linear(nn.Linear):
    """A linear classifier of the input called x."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def new_batch(inputs: torch.Tensor, labels: torch.Tensor, *, name: str = "x", first_id: int = 0) -> Batch:
    return Batch(inputs={name: inputs}, labels=labels, ids=torch.arange(first_id, first_id + len(labels)))


def in_batches(inputs: torch.Tensor, labels: torch.Tensor, *, batch_size: int, name: str = "x") -> list[Batch]:
    return [
        new_batch(inputs[start : start + batch_size], labels[start : start + batch_size], name=name, first_id=start)
        for start in range(0, len(labels), batch_size)
    ]


def test_training_lowers_the_loss_and_evaluation_measures_it() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(64, 2)
    batches = in_batches(inputs, (inputs[:, 0] > 0).long(), batch_size=24)
    trainer = make_trainer(Linear(2, 2), learning_rate=1.0)
    before = trainer.evaluate(batches, class_names="ab")

    metrics = [trainer.train_epoch(batches) for _ in range(20)]
    after = trainer.evaluate(batches, class_names="ab")

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


class TwoParts(nn.Module):
    """Two linear classifiers that learn on their own; their average predicts."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Linear(2, 2), Linear(2, 2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.stack([part(x) for part in self.parts], dim=1)
        return logits if self.training else logits.mean(dim=1)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_parts_of_a_model_each_take_the_step_that_they_would_take_alone(accumulation: int) -> None:
    torch.manual_seed(0)
    model = TwoParts()
    alone = [copy.deepcopy(part) for part in model.parts]
    inputs = torch.randn(8, 2)
    batches = in_batches(inputs, (inputs[:, 0] > 0).long(), batch_size=8)
    # Half the step: the loss of two parts is their mean.
    metrics = make_trainer(model, learning_rate=1.0, accumulation=accumulation).train_epoch(batches)
    singles = [make_trainer(part, learning_rate=0.5).train_epoch(batches) for part in alone]

    assert metrics.loss == pytest.approx(sum(single.loss for single in singles) / 2)
    for part, single in zip(model.parts, alone, strict=True):
        torch.testing.assert_close(part.weight, single.weight)


class Noisy(Linear):
    """Adds fresh noise to every sample of a pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.randn(len(x), 2)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_consistency_adds_the_divergence_of_two_passes(accumulation: int) -> None:
    torch.manual_seed(0)
    model = Noisy(2, 2)
    before = copy.deepcopy(model)
    inputs, labels = torch.randn(8, 2), torch.tensor([0, 1] * 4)
    torch.manual_seed(1)
    metrics = make_trainer(model, accumulation=accumulation, consistency=3.0).train_epoch([new_batch(inputs, labels)])

    torch.manual_seed(1)
    expected = torch.zeros(())
    for part, right in zip(inputs.chunk(accumulation), labels.chunk(accumulation), strict=True):
        first, second = (logits.log_softmax(1) for logits in before(torch.cat((part, part))).chunk(2))
        entropy = (nn.functional.nll_loss(first, right) + nn.functional.nll_loss(second, right)) / 2
        kl = nn.functional.kl_div
        divergence = sum(
            kl(a, b, reduction="batchmean", log_target=True) for a, b in ((first, second), (second, first))
        )
        expected += (entropy + 3.0 * divergence / 2) / accumulation
    assert metrics.loss == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    torch.testing.assert_close(model.weight, before.weight - 0.1 * before.weight.grad)


def test_consistency_costs_nothing_where_passes_agree() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(8, 2)
    plain = Linear(2, 2)
    consistent = copy.deepcopy(plain)
    batches = in_batches(inputs, (inputs[:, 0] > 0).long(), batch_size=4)

    losses = [
        make_trainer(plain).train_epoch(batches).loss,
        make_trainer(consistent, consistency=5.0).train_epoch(batches).loss,
    ]

    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(plain.weight, consistent.weight)


def test_evaluation_changes_nothing() -> None:
    model = build_conv_classifier(in_channels=1, num_classes=2, widths=[2], dropout=0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = in_batches(torch.randn(8, 1, 4, 4), torch.zeros(8, dtype=torch.int64), batch_size=4, name="image")
    trainer = make_trainer(model)

    assert trainer.evaluate(batches, class_names="ab") == trainer.evaluate(batches, class_names="ab")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_gradient_is_clipped_and_its_norm_before_that_is_reported() -> None:
    torch.manual_seed(0)
    model = Linear(2, 2)
    before = model.weight.detach().clone(), model.bias.detach().clone()
    far = torch.tensor([[1000.0, 0.0]])
    batches = [new_batch(far, torch.tensor([int(model(far).argmin())]))]

    metrics = make_trainer(model, learning_rate=1.0, max_grad_norm=0.25).train_epoch(batches)

    moved = torch.cat([(model.weight - before[0]).flatten(), model.bias - before[1]]).norm()
    assert metrics.grad_norm > 100
    assert moved.item() == pytest.approx(0.25, rel=1e-3)


def test_a_loss_that_is_not_a_number_stops_before_the_step() -> None:
    model = Linear(1, 2)
    good = new_batch(torch.ones(2, 1), torch.tensor([0, 1]))
    bad = new_batch(torch.tensor([[float("nan")], [1.0]]), torch.tensor([0, 1]), first_id=40)
    trainer = make_trainer(model, learning_rate=0.125)

    with pytest.raises(
        TrainingDivergedError, match=r"loss became nan at step 3, with a learning rate of 0\.125"
    ) as caught:
        trainer.train_epoch([good, good, bad, good])

    assert trainer.steps == 2
    assert caught.value.step == 3
    assert caught.value.batch.ids.tolist() == [40, 41]
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
        trainer.train_epoch([new_batch(torch.ones(2, 1), torch.tensor([0, 0]))])

    assert not trainer.model.weight.any()


@pytest.mark.parametrize("parts", [2, 3, 5, 8])
def test_accumulation_takes_the_step_of_the_whole_batch(parts: int) -> None:
    torch.manual_seed(0)
    batches = in_batches(torch.randn(21, 3), torch.randint(0, 2, (21,)), batch_size=7)
    whole, divided = Linear(3, 2), Linear(3, 2)
    divided.load_state_dict(whole.state_dict())

    expected = make_trainer(whole, learning_rate=0.5).train_epoch(batches)
    actual = make_trainer(divided, learning_rate=0.5, accumulation=parts).train_epoch(batches)

    torch.testing.assert_close(divided.weight, whole.weight)
    assert actual.loss == pytest.approx(expected.loss, rel=1e-5)
    assert actual.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)


class RecordsDtype(Linear):
    """Remembers in what precision its output was computed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = super().forward(x)
        self.computed_in = output.dtype
        return output


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_that_of_the_forward_pass_and_weights_stay_fp32(precision: str, dtype: torch.dtype) -> None:
    model = RecordsDtype(4, 2)
    batches = in_batches(torch.randn(32, 4), torch.randint(0, 2, (32,)), batch_size=8)

    trainer = make_trainer(model, precision=precision)
    trainer.train_epoch(batches)

    assert model.computed_in == dtype
    assert model.weight.dtype == torch.float32
    trainer.evaluate(batches, class_names="ab")
    assert model.computed_in == dtype


def test_fp16_scales_the_loss_and_learns() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(64, 2)
    batches = in_batches(inputs, (inputs[:, 0] > 0).long(), batch_size=16)
    model = RecordsDtype(2, 2)
    trainer = make_trainer(model, learning_rate=1.0, precision="fp16")

    for _ in range(30):
        metrics = trainer.train_epoch(batches)

    assert model.computed_in == torch.float16
    assert trainer.evaluate(batches, class_names="ab").accuracy > 0.95
    assert metrics.grad_norm < 10  # of the gradient itself, not of the scaled one
    assert trainer.state_dict()["scaler"]["scale"] >= 1


class Overflowing(Linear):
    """Its gradient is infinite in the first steps, as that of a loss scaled too much is."""

    overflows = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = super().forward(x)
        if self.overflows > 0:
            self.overflows -= 1
            output.register_hook(lambda gradient: gradient * float("inf"))
        return output


def test_fp16_leaves_out_steps_that_overflow_and_goes_on() -> None:
    model = Overflowing(2, 2)
    model.overflows = 2
    before = model.weight.detach().clone()
    batches = in_batches(torch.randn(12, 2), torch.tensor([0, 1] * 6), batch_size=4)
    trainer = make_trainer(model, precision="fp16")
    scale = trainer.state_dict()["scaler"]["scale"]
    seen: list[torch.Tensor] = []

    norms: list[float] = []

    def remember(metrics: StepMetrics) -> None:
        seen.append(model.weight.detach().clone())
        norms.append(metrics.grad_norm)

    epoch = trainer.train_epoch(batches, on_step=remember)

    assert [math.isfinite(norm) for norm in norms] == [False, False, True]
    assert epoch.grad_norm == norms[2]

    assert torch.equal(seen[0], before)
    assert torch.equal(seen[1], before)
    assert not torch.equal(seen[2], before)
    assert trainer.state_dict()["scaler"]["scale"] == scale / 4


def test_an_epoch_of_nothing_but_skipped_steps_has_finite_figures() -> None:
    model = Overflowing(2, 2)
    model.overflows = 3
    batches = in_batches(torch.randn(12, 2), torch.tensor([0, 1] * 6), batch_size=4)

    epoch = make_trainer(model, precision="fp16").train_epoch(batches)

    assert epoch.grad_norm == 0
    assert math.isfinite(epoch.loss)


def test_fp16_that_overflows_without_end_has_diverged() -> None:
    model = Overflowing(2, 2)
    model.overflows = 1000
    batches = in_batches(torch.randn(400, 2), torch.tensor([0, 1] * 200), batch_size=4)

    with pytest.raises(TrainingDivergedError, match=r"gradient norm became (inf|nan) at step 26"):
        make_trainer(model, precision="fp16").train_epoch(batches)


def test_each_step_is_told() -> None:
    batches = in_batches(torch.randn(12, 2), torch.tensor([0, 1] * 6), batch_size=4)
    told: list[StepMetrics] = []

    epoch = make_trainer(Linear(2, 2), learning_rate=0.5).train_epoch(batches, on_step=told.append)

    assert [metrics.step for metrics in told] == [1, 2, 3]
    assert {metrics.learning_rate for metrics in told} == {0.5}
    assert epoch.loss == pytest.approx(sum(metrics.loss for metrics in told) / 3)
    assert epoch.grad_norm == pytest.approx(sum(metrics.grad_norm for metrics in told) / 3)


def test_steps_skipped_in_a_row_are_counted_across_a_restore() -> None:
    batches = in_batches(torch.randn(400, 2), torch.tensor([0, 1] * 200), batch_size=4)
    models = [Overflowing(2, 2), Overflowing(2, 2)]
    for model in models:
        model.overflows = 1000
    first, second = (make_trainer(model, precision="fp16") for model in models)
    first.train_epoch(batches[:10])

    second.load_state_dict(first.state_dict())

    with pytest.raises(TrainingDivergedError, match="at step 26"):
        second.train_epoch(batches)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_trainer_restored_in_the_middle_of_an_epoch_ends_it_alike(precision: str) -> None:
    torch.manual_seed(0)
    batches = in_batches(torch.randn(40, 3), torch.randint(0, 2, (40,)), batch_size=8)
    model = Linear(3, 2)
    trainer = make_trainer(model, precision=precision, optimizer_type=torch.optim.AdamW)
    saved: dict[str, object] = {}

    def save(metrics: StepMetrics) -> None:
        if metrics.step == 3:
            saved.update(weights=copy.deepcopy(model.state_dict()), trainer=copy.deepcopy(trainer.state_dict()))

    expected = trainer.train_epoch(batches, on_step=save)
    twin = Linear(3, 2)
    twin.load_state_dict(saved["weights"])
    resumed = make_trainer(twin, precision=precision, optimizer_type=torch.optim.AdamW)
    resumed.load_state_dict(saved["trainer"])

    assert resumed.train_epoch(batches[3:]) == expected
    assert torch.equal(twin.weight, model.weight)
    assert resumed.steps == trainer.steps == 5


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
