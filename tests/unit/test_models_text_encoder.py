"""The text classifier: attention, padding, initialisation, checkpointing, factory, and the ways out of eager mode."""

import io
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.torch_release import TORCH
from models.attention import MultiHeadAttention
from models.blocks import EncoderLayer
from models.errors import DeviceMismatchError, ModelConfigError, ShapeError
from models.factories import TEXT_CLASSIFIER, find_factory
from models.text_encoder import TextClassifier, build_text_classifier

MAX_LENGTH = 12
VOCAB_SIZE = 50
CONFIG = {
    "vocab_size": VOCAB_SIZE,
    "num_classes": 3,
    "hidden_dim": 16,
    "num_layers": 2,
    "num_heads": 4,
    "intermediate_dim": 32,
    "max_length": MAX_LENGTH,
    "dropout": 0.2,
}
SHAPES = [(batch, length) for batch in (1, 3, 8) for length in (1, 7, MAX_LENGTH)]


def build(**changes: object) -> TextClassifier:
    torch.manual_seed(0)
    model = build_text_classifier(**{**CONFIG, **changes})
    with torch.no_grad():
        # As after training: nothing is zero or one that could hide a mistake.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # With tensors this small, a second thread only waits for the first: a hundred times longer on busy cores.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model() -> TextClassifier:
    return build()


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random_ids(batch: int, length: int) -> Tensor:
    """Texts of decreasing lengths; from the fourth on some are nothing but padding."""
    ids = torch.randint(1, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(batch * 100 + length))
    for row in range(batch):
        ids[row, max(0, length - 2 * row) :] = 0
    return ids


@pytest.mark.parametrize(("batch", "length"), SHAPES)
def test_any_batch_and_length_gives_logits(model: TextClassifier, batch: int, length: int) -> None:
    logits = model(random_ids(batch, length))

    assert logits.shape == (batch, 3)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


def test_attention_is_that_of_torch_with_the_same_weights() -> None:
    torch.manual_seed(0)
    attention = MultiHeadAttention(16, 4).eval()
    reference = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    load_attention(reference, attention)
    hidden = torch.randn(3, 7, 16)
    is_text = random_ids(3, 7) != 0

    expected, _ = reference(hidden, hidden, hidden, key_padding_mask=~is_text)

    torch.testing.assert_close(attention(hidden, is_text[:, None, None, :]), expected, rtol=1e-5, atol=1e-6)
    expected, _ = reference(hidden, hidden, hidden)
    torch.testing.assert_close(attention(hidden), expected, rtol=1e-5, atol=1e-6)


def test_an_encoder_layer_is_that_of_torch_with_the_same_weights() -> None:
    torch.manual_seed(0)
    layer = EncoderLayer(16, 4, 32, dropout=0.1).eval()
    reference = nn.TransformerEncoderLayer(16, 4, 32, activation=F.gelu, batch_first=True, norm_first=True).eval()
    load_attention(reference.self_attn, layer.attention)
    for mine, theirs in (
        (layer.feed_forward[0], reference.linear1),
        (layer.feed_forward[3], reference.linear2),
        (layer.layer_norm1, reference.norm1),
        (layer.layer_norm2, reference.norm2),
    ):
        nn.init.normal_(mine.bias)
        theirs.load_state_dict(mine.state_dict())
    hidden = torch.randn(3, 7, 16)
    is_text = random_ids(3, 7) != 0

    output = layer(hidden, is_text[:, None, None, :])

    expected = reference(hidden, src_key_padding_mask=~is_text)
    torch.testing.assert_close(output[is_text], expected[is_text], rtol=1e-5, atol=1e-5)


def load_attention(reference: nn.MultiheadAttention, attention: MultiHeadAttention) -> None:
    nn.init.normal_(attention.qkv.bias)
    nn.init.normal_(attention.output.bias)
    reference.load_state_dict(
        {
            "in_proj_weight": attention.qkv.weight,
            "in_proj_bias": attention.qkv.bias,
            "out_proj.weight": attention.output.weight,
            "out_proj.bias": attention.output.bias,
        }
    )


@pytest.mark.parametrize("masked", [False, True])
def test_padding_and_neighbours_do_not_change_a_text(model: TextClassifier, masked: bool) -> None:
    ids = random_ids(5, MAX_LENGTH)
    mask = ids != 0
    if masked:
        # Whatever stands in the padding, only the mask counts.
        ids = ids.masked_fill(~mask, 7)

    together = model(ids, mask) if masked else model(ids)

    alone = torch.cat([model(row[keep][None]) for row, keep in zip(ids, mask, strict=True)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_a_padding_token_other_than_zero_is_known() -> None:
    model = build(pad_id=4)
    ids = torch.tensor([[9, 8, 4, 4]])

    torch.testing.assert_close(model(ids), model(ids[:, :2]), rtol=0, atol=1e-5)
    assert not build_text_classifier(**{**CONFIG, "pad_id": 4}).token_embedding.weight[4].any()


def test_masks_of_numbers_and_of_booleans_are_the_same(model: TextClassifier) -> None:
    ids = random_ids(3, 7)

    torch.testing.assert_close(model(ids, (ids != 0).long()), model(ids, ids != 0), rtol=0, atol=0)


def test_every_token_and_its_place_count(model: TextClassifier) -> None:
    text = torch.tensor([[3, 4, 5, 6]])
    logits = model(text)

    for other in ([3, 4, 5, 7], [4, 3, 5, 6], [9, 4, 5, 6]):
        assert (model(torch.tensor([other])) - logits).abs().max() > 1e-3


def test_rows_of_padding_are_harmless(model: TextClassifier) -> None:
    ids = torch.tensor([[3, 4, 5], [0, 0, 0]])

    logits = model.train()(ids)
    logits.sum().backward()

    torch.testing.assert_close(logits[1], model.classifier.bias, rtol=0, atol=0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert not model.token_embedding.weight.grad[0].any()


def test_no_row_attends_to_nothing(model: TextClassifier) -> None:
    seen: list[Tensor] = []
    model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))

    model(torch.tensor([[3, 4, 0], [0, 0, 0]]))

    assert seen[0].tolist() == [[[[True, True, False]]], [[[True, True, True]]]]


def test_weights_start_with_xavier_and_small_embeddings() -> None:
    torch.manual_seed(0)
    model = build_text_classifier(**{**CONFIG, "vocab_size": 2000, "max_length": 500, "hidden_dim": 64})

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert len(layers) == 2 * 4 + 1
    for name, linear in layers:
        # Queries, keys and values lie side by side, and each has the bound of a layer of its own.
        for weight in linear.weight.chunk(3) if name.endswith("qkv") else [linear.weight]:
            bound = math.sqrt(6 / sum(weight.shape))
            assert 0.95 * bound < weight.abs().max().item() <= bound
        assert not linear.bias.any()
    assert model.token_embedding.weight[1:].std().item() == pytest.approx(0.02, rel=0.02)
    assert model.position_embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not model.token_embedding.weight[0].any()


@pytest.mark.parametrize(
    "place",
    [
        "embedding_dropout",
        "layers.0.attention.dropout",
        "layers.0.feed_forward.2",
        "layers.1.feed_forward.4",
        "pooled_dropout",
    ],
)
def test_dropout_is_active_in_training_only(model: TextClassifier, place: str) -> None:
    ids = random_ids(2, 7)

    torch.testing.assert_close(model(ids), model(ids), rtol=0, atol=0)
    model.get_submodule(place).train()
    assert not torch.equal(model(ids), model(ids))


def seen_in_training(model: TextClassifier, ids: Tensor) -> Tensor:
    """[B, T], which tokens attention could see in one forward pass of a training."""
    seen: list[Tensor] = []
    handle = model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    model.train()(ids)
    handle.remove()
    return seen[0][:, 0, 0]


def test_token_dropout_hides_its_share_of_the_tokens_in_training() -> None:
    model = build(token_dropout=0.3)
    ids = torch.full((400, MAX_LENGTH), 3)
    ids[:, 8:] = 0

    seen = seen_in_training(model, ids)

    # 3,200 tokens: three standard deviations are 0.025.
    assert seen[:, :8].float().mean().item() == pytest.approx(0.7, abs=0.025)
    assert not seen[:, 8:].any()
    assert len({tuple(row) for row in seen.tolist()}) > 50
    assert not torch.equal(seen, seen_in_training(model, ids))


def test_a_hidden_token_is_as_good_as_absent() -> None:
    model = build(token_dropout=0.5, dropout=0.0)
    ids = torch.randint(1, VOCAB_SIZE, (16, MAX_LENGTH), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(3)
    seen = seen_in_training(model, ids)
    torch.manual_seed(3)
    logits = model(ids)

    torch.testing.assert_close(logits, model.eval()(ids, seen), rtol=1e-5, atol=1e-6)


def test_a_text_whose_tokens_are_all_hidden_is_an_empty_one() -> None:
    model = build(token_dropout=0.999, dropout=0.0).train()

    logits = model(torch.full((4, 1), 3))
    logits.sum().backward()

    torch.testing.assert_close(logits, model.classifier.bias.expand(4, -1), rtol=0, atol=0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_token_dropout_draws_on_the_global_generator_and_only_if_asked_for() -> None:
    ids = random_ids(8, MAX_LENGTH)

    def trained(token_dropout: float) -> tuple[Tensor, Tensor]:
        model = build(token_dropout=token_dropout, dropout=0.0).train()
        torch.manual_seed(1)
        return model(ids), torch.get_rng_state()

    assert torch.equal(trained(0.5)[0], trained(0.5)[0])
    after = trained(0.0)[1]
    torch.manual_seed(1)
    assert torch.equal(after, torch.get_rng_state())


def test_token_dropout_is_off_in_evaluation() -> None:
    ids = random_ids(8, MAX_LENGTH)

    assert torch.equal(build(token_dropout=0.9)(ids), build()(ids))


# torch deprecates TorchScript; it is still one of the two formats that TorchServe loads by itself.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("convert", ["trace", "script", "export"])
def test_token_dropout_vanishes_on_the_ways_out_of_eager_mode(convert: str) -> None:
    model = build(token_dropout=0.9)
    example = arguments(random_ids(2, 5), masked=True)
    if convert == "export":
        converted = torch.export.export(model, example, dynamic_shapes=dynamic_axes(masked=True)).module()
    else:
        converted = torch.jit.trace(model, example) if convert == "trace" else torch.jit.script(model)

    assert_answers_like(model, converted, masked=True)


def test_it_learns_which_of_two_words_comes_first() -> None:
    torch.manual_seed(0)
    model = build_text_classifier(**{**CONFIG, "num_classes": 2, "num_layers": 1, "dropout": 0.0})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    places = torch.rand(64, 6).argsort(dim=1)
    ids = torch.full((64, 6), 3).scatter(1, places[:, :1], 1).scatter(1, places[:, 1:2], 2)
    labels = (places[:, 0] < places[:, 1]).long()

    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(ids), labels)
        loss.backward()
        optimizer.step()

    assert loss.item() < 0.05


def test_gradient_checkpointing_gives_the_same_gradients_from_less_memory() -> None:
    ids = random_ids(8, MAX_LENGTH)
    plain, checkpointed = build().train(), build(gradient_checkpointing=True).train()

    plain_bytes = saved_bytes(plain, ids)
    checkpointed_bytes = saved_bytes(checkpointed, ids)

    # What is left are the embeddings, the pooling and the classifier.
    assert checkpointed_bytes < plain_bytes / 4
    for mine, theirs in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=0)


def test_gradient_checkpointing_is_off_in_evaluation() -> None:
    ids = random_ids(8, MAX_LENGTH)

    assert saved_bytes(build(gradient_checkpointing=True), ids) == saved_bytes(build(), ids)


def saved_bytes(model: TextClassifier, ids: Tensor) -> int:
    """What autograd keeps from a forward pass to the backward pass that follows."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids).square().sum()
    loss.backward()
    return sum(sizes)


@pytest.mark.usefixtures("deterministic")
def test_the_same_seed_gives_the_same_gradients_bit_by_bit() -> None:
    def gradients() -> list[Tensor]:
        model = build().train()
        torch.manual_seed(1)
        model(random_ids(8, MAX_LENGTH)).square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    for first, second in zip(gradients(), gradients(), strict=True):
        assert torch.equal(first, second)


def test_it_runs_in_bfloat16(model: TextClassifier) -> None:
    ids = random_ids(8, MAX_LENGTH)
    logits = model(ids)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(ids)

    torch.testing.assert_close(mixed.float(), logits, rtol=0.05, atol=0.05)
    torch.testing.assert_close(model.bfloat16()(ids).float(), logits, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.ones(2, MAX_LENGTH + 1), None, "input_ids has 13 tokens a text, and this model takes 1 to 12"),
        (torch.ones(2, 0), None, "input_ids has 0 tokens"),
        (torch.ones(5), None, r"input_ids has shape \[5\] .* add the batch axis"),
        (torch.ones(2, 5), torch.ones(2, 4), r"attention_mask has shape \[2, 4\] where \[2, 5\] is expected"),
    ],
)
def test_a_misshapen_input_is_explained(model: TextClassifier, ids: Tensor, mask: Tensor | None, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        model(ids.long(), mask)


def test_inputs_on_another_device_are_explained(model: TextClassifier) -> None:
    with pytest.raises(DeviceMismatchError, match="attention_mask is on meta and Embedding on cpu"):
        model(torch.ones(2, 5).long(), torch.ones(2, 5, device="meta"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": 1}, "vocab_size is 1"),
        ({"num_classes": 1}, "num_classes is 1"),
        ({"num_classes": True}, "num_classes is True"),
        ({"hidden_dim": 0}, "hidden_dim is 0"),
        ({"hidden_dim": 18}, "hidden_dim is 18 and num_heads is 4; make hidden_dim a multiple"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"intermediate_dim": 2.5}, "intermediate_dim is 2.5"),
        ({"max_length": -1}, "max_length is -1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": "0.1"}, "dropout is '0.1'"),
        ({"token_dropout": 1.0}, "token_dropout is 1.0"),
        ({"token_dropout": -0.1}, "token_dropout is -0.1"),
        ({"token_dropout": True}, "token_dropout is True"),
        ({"token_dropout": "0.1"}, "token_dropout is '0.1'"),
        ({"pad_id": -1}, "pad_id is -1"),
        ({"pad_id": VOCAB_SIZE}, "pad_id is 50 and vocab_size is 50"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing is 1"),
        ({"num_head": 1}, "'num_head'; did you mean num_heads"),
        ({"q": 1}, "'q'; it takes vocab_size"),
    ],
)
def test_a_bad_argument_is_named(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ModelConfigError, match=named):
        build_text_classifier(**{**CONFIG, **changes})


def test_a_missing_argument_is_named() -> None:
    config = {name: value for name, value in CONFIG.items() if name not in {"vocab_size", "max_length"}}

    with pytest.raises(ModelConfigError, match="needs vocab_size and max_length"):
        build_text_classifier(**config)


def test_heads_that_do_not_divide_are_refused_by_the_layer_too() -> None:
    with pytest.raises(ModelConfigError, match="hidden_dim is 10 and num_heads is 4"):
        EncoderLayer(10, 4, 32)


def test_checkpoints_may_name_it() -> None:
    assert find_factory(TEXT_CLASSIFIER) is build_text_classifier


def arguments(ids: Tensor, masked: bool) -> tuple[Tensor, ...]:
    return (ids, ids != 0) if masked else (ids,)


def assert_answers_like(model: TextClassifier, converted: Callable[..., Tensor], masked: bool) -> None:
    for batch, length in SHAPES:
        inputs = arguments(random_ids(batch, length), masked)
        with torch.no_grad():
            torch.testing.assert_close(converted(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


# torch deprecates TorchScript; it is still one of the two formats that TorchServe loads by itself.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("method", ["trace", "script"])
def test_torchscript_answers_like_eager(model: TextClassifier, method: str, masked: bool) -> None:
    example = arguments(random_ids(2, 5), masked)
    converted = torch.jit.trace(model, example) if method == "trace" else torch.jit.script(model)

    assert_answers_like(model, converted, masked)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model_leaves_checkpointing_out() -> None:
    model = build(gradient_checkpointing=True, dropout=0.0)
    ids = random_ids(3, 7)
    scripted = torch.jit.script(model).train()

    torch.testing.assert_close(scripted(ids), model(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_an_exported_program_answers_like_eager(model: TextClassifier, masked: bool) -> None:
    example = arguments(random_ids(2, 5), masked)
    program = torch.export.export(model, example, dynamic_shapes=dynamic_axes(masked))

    assert_answers_like(model, program.module(), masked)


# The exporter remarks that ids and mask share their axes, which is what is meant.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:# The axis name")
@pytest.mark.skipif(
    TORCH < (2, 11), reason="torch before 2.11 wants lengths of two and more here; export/program.py asks otherwise"
)
@pytest.mark.parametrize("masked", [False, True])
def test_onnx_answers_like_eager(model: TextClassifier, masked: bool) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    names = ["input_ids", "attention_mask"][: 1 + masked]
    file = io.BytesIO()
    program = torch.onnx.export(
        model,
        arguments(random_ids(2, 5), masked),
        dynamo=True,
        opset_version=20,
        input_names=names,
        output_names=["logits"],
        dynamic_shapes=dynamic_axes(masked),
        verbose=False,
    )
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Tensor:
        feeds = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, feeds)[0])

    assert_answers_like(model, run, masked)


def dynamic_axes(masked: bool) -> tuple[dict[int, object], ...]:
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=MAX_LENGTH)}
    return (axes,) * (1 + masked)
