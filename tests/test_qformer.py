"""The Q-Former against transformers' own at the same weights, and the properties it must have by itself."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import InstructBlipQFormerConfig
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel

from qformer.errors import ConfigError
from qformer.nn.attention import CrossAttention
from qformer.nn.losses import token_log_likelihood
from qformer.nn.qformer import QFormer, QFormerConnector, QFormerSize, attention_entropy, query_cosine
from qformer.nn.tokens import Tokens

SIZE = QFormerSize(
    vision_width=10,
    hidden=12,
    layers=4,
    heads=3,
    intermediate=20,
    vocabulary=30,
    positions=9,
    queries=5,
    cross_attention_every=2,
    dropout=0.1,
)
IMAGE_TOKENS = 7
HF_NAMES = [
    (r"blocks\.(\d+)\.", r"encoder.layer.\1."),
    (r"self_attention\.output\.", "attention.output.dense."),
    (r"self_attention\.norm\.", "attention.output.LayerNorm."),
    (r"self_attention\.", "attention.attention."),
    (r"cross_attention\.output\.", "crossattention.output.dense."),
    (r"cross_attention\.norm\.", "crossattention.output.LayerNorm."),
    (r"cross_attention\.", "crossattention.attention."),
    (r"text_feed_forward\.inner\.", "intermediate.dense."),
    (r"text_feed_forward\.outer\.", "output.dense."),
    (r"text_feed_forward\.norm\.", "output.LayerNorm."),
    (r"query_feed_forward\.inner\.", "intermediate_query.dense."),
    (r"query_feed_forward\.outer\.", "output_query.dense."),
    (r"query_feed_forward\.norm\.", "output_query.LayerNorm."),
    (r"^norm\.", "embeddings.layernorm."),
    (r"^(word|position)_embeddings\.", r"embeddings.\1_embeddings."),
]


def hf_name(name: str) -> str:
    for pattern, replacement in HF_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def redrawn(module: nn.Module, seed: int = 1) -> nn.Module:
    """Every parameter drawn anew, norms and biases too, so that nothing is tested at its trivial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.4)
    return module


def build(size: QFormerSize = SIZE, seed: int = 1) -> QFormer:
    return redrawn(QFormer(size).double(), seed).eval()


def inputs(rows: int = 3, size: QFormerSize = SIZE, seed: int = 2) -> tuple[Tokens, tuple[Tensor, Tensor]]:
    """Image tokens, and instructions of 6, 4, 2 … ids padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, IMAGE_TOKENS, size.vision_width, generator=generator, dtype=torch.float64)
    ids = torch.randint(1, max(2, size.vocabulary), (rows, 6), generator=generator)
    lengths = torch.tensor([6 - 2 * (row % 3) for row in range(rows)])
    mask = torch.arange(6) < lengths[:, None]
    return Tokens(values), (ids * mask, mask)


def assert_close(ours: Tensor, theirs: Tensor, name: str = "", floor: float = 1e-30) -> None:
    """Within 1e-9 of the tensor's norm; `floor` is what rounding may leave where a tensor is nearly zero."""
    assert (ours - theirs).norm() <= 1e-9 * theirs.norm() + floor, name


def hf_model(ours: QFormer) -> InstructBlipQFormerModel:
    size = ours.size
    config = InstructBlipQFormerConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.intermediate,
        max_position_embeddings=size.positions,
        cross_attention_frequency=size.cross_attention_every,
        encoder_hidden_size=size.vision_width,
        hidden_dropout_prob=size.dropout,
        attention_probs_dropout_prob=size.dropout,
    )
    model = InstructBlipQFormerModel(config).double().eval()
    weights = {hf_name(name): tensor for name, tensor in ours.state_dict().items() if name != "queries"}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert ours.size.instruction == (not missing)
    return model


@pytest.mark.parametrize("image_mask", [False, True])
@pytest.mark.parametrize("instruction", [True, False])
@pytest.mark.parametrize(("every", "layers"), [(2, 4), (1, 3), (3, 4)])
def test_outputs_and_gradients_equal_transformers(every: int, layers: int, instruction: bool, image_mask: bool):
    ours = build(replace(SIZE, cross_attention_every=every, layers=layers))
    theirs = hf_model(ours)
    tokens, text = inputs()
    seen = torch.ones(3, IMAGE_TOKENS, dtype=torch.bool)
    if image_mask:
        seen[1, 4:], seen[2, :3] = False, False
        tokens = tokens._replace(mask=seen)
    ids, mask = text if instruction else (None, torch.ones(3, 0, dtype=torch.long))
    values, hf_values = (tokens.values.clone().requires_grad_() for _ in range(2))
    hf_queries = ours.queries.detach().clone().requires_grad_()

    output = ours(tokens._replace(values=values), text if instruction else None)
    hf_output = theirs(
        input_ids=ids,
        attention_mask=torch.cat([torch.ones(3, SIZE.queries, dtype=torch.long), mask.long()], dim=1),
        query_embeds=hf_queries.expand(3, -1, -1),
        encoder_hidden_states=hf_values,
        encoder_attention_mask=seen.long(),
    ).last_hidden_state[:, : SIZE.queries]
    assert_close(output, hf_output)

    direction = torch.randn(output.shape, dtype=output.dtype)
    (output * direction).sum().backward()
    (hf_output * direction).sum().backward()
    assert_close(values.grad, hf_values.grad, "image tokens")
    assert_close(ours.queries.grad, hf_queries.grad, "queries")
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    # Deep queries that look alike hardly need to be told apart: such gradients are rounding of sums that cancel.
    rounding = 1e-15 * max(float(gradient.norm()) for gradient in gradients.values() if gradient is not None)
    for name, parameter in ours.named_parameters():
        if name == "queries" or name.endswith("key.bias"):
            continue
        expected = gradients[hf_name(name)]
        if parameter.grad is None:
            assert expected is None or not expected.any(), name
        else:
            assert_close(parameter.grad, expected, name, rounding)


def test_every_parameter_gets_a_gradient_except_those_that_cannot():
    connector = redrawn(QFormerConnector(QFormer(SIZE), 8).double())
    connector(*inputs()).square().sum().backward()
    last = f"qformer.blocks.{SIZE.layers - 1}.text_feed_forward."
    for name, parameter in connector.named_parameters():
        if name.startswith(last):
            assert not parameter.requires_grad, name
            assert parameter.grad is None, name
        elif name.endswith("key.bias"):
            assert parameter.grad.abs().max() < 1e-9, name
        else:
            assert parameter.grad.abs().max() > 1e-6, name
    assert any(name.startswith(last) for name in connector.state_dict())


def test_without_an_instruction_there_are_no_text_weights():
    qformer = build(replace(SIZE, instruction=False, vocabulary=0))
    assert not [name for name in qformer.state_dict() if "text" in name or "embeddings" in name]
    with_text = build()
    with_text.load_state_dict(qformer.state_dict(), strict=False)
    tokens, _ = inputs()
    assert_close(qformer(tokens), with_text(tokens))


def test_a_row_does_not_depend_on_the_padding_of_others():
    qformer = build()
    tokens, (ids, mask) = inputs()
    together = qformer(tokens, (ids, mask))
    for row in range(3):
        length = int(mask[row].sum())
        alone = qformer(
            Tokens(tokens.values[row : row + 1]), (ids[row : row + 1, :length], mask[row : row + 1, :length])
        )
        assert_close(alone[0], together[row])
    assert_close(qformer(tokens, (torch.where(mask, ids, 17), mask)), together)


def test_masked_image_tokens_are_not_seen():
    qformer = build()
    tokens, text = inputs()
    mask = torch.arange(IMAGE_TOKENS).expand(3, -1) < 4
    spoilt = torch.where(mask[..., None], tokens.values, 1e3)
    assert_close(qformer(Tokens(spoilt, mask), text), qformer(Tokens(tokens.values[:, :4]), text))


def test_instruction_and_picture_change_the_output():
    qformer = build()
    tokens, (ids, mask) = inputs()
    output = qformer(tokens, (ids, mask))
    assert (qformer(tokens, (torch.where(mask, 3, 0), mask)) - output).abs().max() > 1e-3
    assert (qformer(Tokens(tokens.values.flip(0)), (ids, mask)) - output).abs().max() > 1e-3
    assert (qformer(tokens) - output).abs().max() > 1e-3


@pytest.mark.parametrize(("every", "seeing"), [(1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3]), (9, [0])])
def test_every_nth_block_looks_at_the_picture(every: int, seeing: list[int]):
    qformer = QFormer(replace(SIZE, cross_attention_every=every))
    assert [n for n, block in enumerate(qformer.blocks) if block.cross_attention is not None] == seeing


def test_dropout_acts_in_training_only_and_follows_the_setting():
    tokens, text = inputs()
    dropping, plain = build().train(), build(replace(SIZE, dropout=0.0)).train()
    assert not torch.equal(dropping(tokens, text), dropping(tokens, text))
    assert torch.equal(plain(tokens, text), plain(tokens, text))
    assert torch.equal(dropping.eval()(tokens, text), plain.eval()(tokens, text))


def test_neither_padding_nor_the_last_blocks_text_is_computed():
    """Three reads of five queries, with six, four and two words."""
    qformer = build()
    computed = []
    for block in qformer.blocks:
        block.self_attention.register_forward_hook(lambda _module, _inputs, output: computed.append(output.shape))
    qformer(*inputs())
    assert computed == [(27, 12), (27, 12), (27, 12), (15, 12)]


def test_reads_without_a_word_are_reads_without_an_instruction():
    qformer = build()
    tokens, (ids, mask) = inputs()
    mask[1] = False
    one = Tokens(tokens.values[1:2])
    assert_close(qformer(tokens, (ids, mask))[1:2], qformer(one))
    assert_close(qformer(one, (ids[1:2], mask[1:2])), qformer(one))
    assert_close(qformer(one, (ids[1:2, :0], mask[1:2, :0])), qformer(one))


def test_new_weights_follow_the_generator_and_are_bert_like():
    size = replace(SIZE, hidden=48, intermediate=96, vocabulary=200, queries=32)
    first, again, other = (QFormer(size, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
        if name.endswith("bias"):
            assert not tensor.any(), name
        elif "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        else:
            assert tensor.std() == pytest.approx(0.02, rel=0.1), name
    assert not torch.equal(first.queries, other.queries)
    projections = [
        QFormerConnector(first, 8, torch.Generator().manual_seed(seed)).projection.weight for seed in (3, 3, 4)
    ]
    assert torch.equal(projections[0], projections[1])
    assert not torch.equal(projections[0], projections[2])


def test_the_connector_is_norm_qformer_and_projection():
    connector = redrawn(QFormerConnector(QFormer(SIZE), 8).double()).eval()
    tokens, text = inputs()
    normed = nn.functional.layer_norm(tokens.values, (10,), connector.norm.weight, connector.norm.bias, eps=1e-5)
    expected = connector.qformer(Tokens(normed), text) @ connector.projection.weight.T + connector.projection.bias
    assert connector(tokens, text).shape == (3, 5, 8)
    assert_close(connector(tokens, text), expected)
    assert connector.size == SIZE
    assert connector.dtype == torch.float64


@pytest.mark.parametrize("masked", [False, True])
def test_reads_of_one_picture_share_its_keys_and_values(masked: bool):
    connector = redrawn(QFormerConnector(QFormer(SIZE), 8).double()).eval()
    tokens, text = inputs(rows=5)
    mask = torch.arange(IMAGE_TOKENS).expand(2, -1) < torch.tensor([[IMAGE_TOKENS], [3]]) if masked else None
    shared = Tokens(tokens.values[:2], mask, None, torch.tensor([1, 0, 1, 1, 0]))
    assert shared.reads == 5 and shared.spread().values.shape == tokens.values.shape
    found, expected = connector(shared, text), connector(shared.spread(), text)
    assert_close(found, expected)
    assert_close(connector.look(shared, text)[0], connector.look(shared.spread(), text)[0])
    for parameters, output in ((found_gradients := {}, found), (expected_gradients := {}, expected)):
        connector.zero_grad()
        output.square().sum().backward()
        parameters |= {name: each.grad for name, each in connector.named_parameters() if each.grad is not None}
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in found_gradients.items():
        assert_close(gradient, expected_gradients[name], name, 1e-12)
    seen: list[int] = []
    cross = connector.qformer.blocks[0].cross_attention
    cross.key.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    connector(shared, text)
    assert seen == [2]


def test_looking_changes_neither_numbers_nor_random_state():
    connector = redrawn(QFormerConnector(QFormer(SIZE), 8).double()).eval()
    tokens, text = inputs()
    before, state = connector(tokens, text), torch.get_rng_state()
    outputs, entropy = connector.look(tokens, text)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(connector(tokens, text), before)
    assert_close(connector.projection(outputs), before)
    assert not outputs.requires_grad
    assert 0 < float(entropy) < 1


def test_probabilities_for_monitors_are_those_of_the_forward():
    attention = redrawn(CrossAttention(12, 10, 3, 0.0).double())
    x, values = torch.randn(2, 5, 12).double(), torch.randn(2, 7, 10).double()
    mask = torch.arange(7).expand(2, -1) < torch.tensor([[7], [4]])
    weights = attention.probabilities(x, values, mask)
    context = (weights @ attention.value(values).unflatten(-1, (3, 4)).transpose(1, 2)).transpose(1, 2).flatten(2)
    assert_close(attention(x, Tokens(values, mask)), attention.norm(x + attention.output(context)))


def test_query_cosine_is_one_for_equal_queries_and_the_mean_over_pairs_otherwise():
    assert float(query_cosine(torch.ones(2, 4, 3))) == pytest.approx(1)
    assert float(query_cosine(torch.eye(3)[None])) == pytest.approx(0, abs=1e-6)
    outputs = torch.randn(3, 4, 6)
    pairs = [
        torch.cosine_similarity(outputs[:, i], outputs[:, j], dim=-1) for i in range(4) for j in range(4) if i != j
    ]
    assert float(query_cosine(outputs)) == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-6)
    assert float(query_cosine(torch.ones(2, 1, 3))) == 0


def test_attention_entropy_is_one_when_uniform_and_zero_on_one_token():
    assert float(attention_entropy(torch.full((2, 3, 4, 5), 0.2))) == pytest.approx(1)
    single = torch.zeros(2, 3, 4, 5)
    single[..., 2] = 1
    assert float(attention_entropy(single)) == 0
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    uniform = (mask / mask.sum(-1, keepdim=True))[:, None, None].expand(2, 3, 4, 5)
    assert float(attention_entropy(uniform, mask)) == pytest.approx(1)
    assert float(attention_entropy(torch.ones(2, 3, 4, 1))) == 1


def test_uniform_cross_attention_reads_as_entropy_one():
    qformer = build()
    for block in qformer.blocks:
        if block.cross_attention is not None:
            nn.init.zeros_(block.cross_attention.query.weight)
            nn.init.zeros_(block.cross_attention.query.bias)
    assert float(qformer.look(*inputs())[1]) == pytest.approx(1)


def test_token_log_likelihood_is_the_log_softmax_at_the_target_in_float32():
    logits, targets = torch.randn(2, 3, 7), torch.randint(7, (2, 3))
    expected = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(token_log_likelihood(logits, targets), expected)
    assert token_log_likelihood(logits.bfloat16(), targets).dtype == torch.float32
    assert token_log_likelihood(logits.double(), targets).dtype == torch.float64
    assert token_log_likelihood(logits[:, :0], targets[:, :0]).shape == (2, 0)


def test_tokens_of_another_width_are_refused():
    with pytest.raises(ConfigError, match=r"image tokens are 11 wide and the Q-Former was built for 10"):
        build()(Tokens(torch.zeros(1, 7, 11).double()))


def test_an_instruction_beyond_the_positions_is_refused():
    ids = torch.ones(3, 10, dtype=torch.long)
    with pytest.raises(ConfigError, match=r"10 ids and the Q-Former has 9 positions; set qformer\.instruction_limit"):
        build()(inputs()[0], (ids, ids.bool()))


def test_an_instruction_for_a_qformer_without_text_is_refused():
    with pytest.raises(ConfigError, match="built without one; leave the instruction out"):
        build(replace(SIZE, instruction=False))(*inputs())


def test_sizes_that_cannot_be_built_are_refused():
    with pytest.raises(ConfigError, match=r"qformer\.hidden \(12\) must divide evenly by qformer\.heads \(5\)"):
        replace(SIZE, heads=5)
    with pytest.raises(ConfigError, match=r"qformer\.layers is 0; it must be at least 1"):
        replace(SIZE, layers=0)
