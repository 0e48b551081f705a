import itertools
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_bert import TINY
from tolerances import TOLERANCE, assert_as_near, error, tolerance
from torch import Tensor, nn

from minibert.blocks import SPARED, block_sizes, next_multiple
from minibert.model import Bert, BertConfig
from minibert.pooling import POOLINGS
from minibert.sequences import Sequences
from minibert.tokenizer import Tokenizer
from minibert.weights import load_bert

# One sequence: its token ids and its token types.
Text = tuple[list[int], list[int]]
SENTENCES = [
    "A man is playing a guitar.",
    "",
    "Unaffable naïve tokenization, 日本語 and 😀!",
    ("How can I be a good geologist?", "What should I do to be a great geologist?"),
    ("The plane is taking off.", ""),
    "the " * 126,
    ("It never fails to engage us. " * 9, "A short one."),
]


def random_texts(lengths: list[int], vocab_size: int, seed: int = 0) -> list[Text]:
    """The last third of each is of the second type. No [PAD], id 0: transformers gives it no gradient."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randint(1, vocab_size, (length,), generator=generator).tolist(),
            [int(i >= length - length // 3) for i in range(length)],
        )
        for length in lengths
    ]


def run_packed(bert: Bert, texts: list[Text], filler: int = 0) -> tuple[list[Tensor], Tensor | None]:
    """Hidden states of each sequence, [length, H] each, and the pooler's vectors [S, H]."""
    lengths = tuple(len(ids) for ids, _ in texts)
    sequences = Sequences(lengths, filler)
    ids = torch.tensor([i for ids, _ in texts for i in ids] + [1] * filler)
    types = torch.tensor([t for _, types in texts for t in types] + [0] * filler)
    hidden = bert(ids, types, sequences)
    assert hidden.shape == (sum(lengths) + filler, bert.config.hidden_size)
    pooled = POOLINGS["pooler"](bert, hidden, sequences) if bert.pooler else None
    return list(hidden[: sum(lengths)].split(lengths)), pooled


def run_padded(model: transformers.BertModel, texts: list[Text]) -> tuple[list[Tensor], Tensor | None]:
    """The same, by transformers, in one padded rectangle with an attention mask."""
    longest = max(len(ids) for ids, _ in texts)
    ids, types, mask = (torch.zeros(len(texts), longest, dtype=torch.long) for _ in range(3))
    for row, (text_ids, text_types) in enumerate(texts):
        ids[row, : len(text_ids)] = torch.tensor(text_ids)
        types[row, : len(text_ids)] = torch.tensor(text_types)
        mask[row, : len(text_ids)] = 1
    out = model(input_ids=ids, token_type_ids=types, attention_mask=mask)
    return [
        h[: len(text[0])] for h, text in zip(out.last_hidden_state, texts, strict=True)
    ], out.pooler_output


def randomize(model: nn.Module, std: float, seed: int = 0) -> None:
    """No tensor stays at a value, 0 or 1, that would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        spread = std if parameter.ndim > 1 else 0.1
        nn.init.normal_(parameter, float(name.endswith("LayerNorm.weight")), spread, generator)


def twins(config: BertConfig, std: float) -> tuple[Bert, transformers.BertModel]:
    """The same random weights in both implementations, in fp64, without dropout."""
    theirs = transformers.BertModel(transformers.BertConfig(**asdict(config), attn_implementation="eager"))
    randomize(theirs, std)
    ours = Bert(config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.double().eval(), theirs.double().eval()


@pytest.fixture(scope="module")
def tiny_twins() -> tuple[Bert, transformers.BertModel]:
    return twins(TINY, std=0.3)


@pytest.fixture(scope="module")
def thin_twins() -> tuple[Bert, transformers.BertModel]:
    """One thin layer, so that length costs little."""
    config = replace(
        TINY, max_position_embeddings=512, num_hidden_layers=1, num_attention_heads=1, hidden_size=8
    )
    return twins(config, std=0.3)


@pytest.fixture(scope="module")
def minilm_twins(minilm: Path) -> tuple[Bert, transformers.BertModel]:
    theirs = transformers.BertModel.from_pretrained(minilm, attn_implementation="eager")
    return load_bert(minilm).eval(), theirs.eval()


@pytest.fixture(scope="module")
def base_twins() -> tuple[Bert, transformers.BertModel]:
    """bert-base's shape with random weights, read from a file with the names of the published one."""
    config = transformers.BertConfig(vocab_size=2000, attn_implementation="eager")
    theirs = transformers.BertModel(config)
    randomize(
        theirs, std=0.02
    )  # BERT's own; with twice that all tokens end alike, and gradients are rounding
    state = {}
    for name, tensor in theirs.state_dict().items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        state[f"bert.{name}"] = tensor
    state["bert.embeddings.position_ids"] = torch.arange(512)[None]
    state["cls.predictions.bias"] = torch.zeros(2000)
    state["cls.seq_relationship.weight"] = torch.zeros(2, 768)
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        save_file(state, Path(folder) / "model.safetensors")
        ours = load_bert(Path(folder))
    return ours.eval(), theirs.eval()


def gradients(
    run: Callable[[list[Text]], tuple[list[Tensor], Tensor]], model: nn.Module, texts: list[Text]
) -> dict[str, Tensor]:
    """Of a fixed random weighing of every hidden state and every pooled vector."""
    hidden, pooled = run(model, texts)
    generator = torch.Generator().manual_seed(1)
    weighed = [(x * torch.randn(x.shape, generator=generator)).mean() for x in [*hidden, pooled]]
    model.zero_grad()
    sum(weighed).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_gradients_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], allowed: float) -> None:
    """Each within `allowed` of the largest entry of its tensor.

    A key's bias shifts all scores of a query alike, which softmax ignores: its gradient is 0 but for
    rounding, so it is measured against the query's bias.
    """
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        scale = theirs[name.replace("key.bias", "query.bias")].abs().max()
        assert scale > 0, name
        torch.testing.assert_close(
            ours[name], grad, atol=allowed * float(scale), rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


class TestParity:
    @torch.no_grad()
    def test_the_real_minilm_computes_what_transformers_computes_on_sentences(
        self, minilm: Path, minilm_twins
    ):
        ours, theirs = minilm_twins
        texts = [(e.input_ids, e.token_type_ids) for e in Tokenizer(minilm, 128, 30522)(SENTENCES)]
        torch.testing.assert_close(
            run_packed(ours, texts), run_padded(theirs, texts), **tolerance(torch.float32)
        )

    @pytest.mark.parametrize(
        "lengths", [[1], [512], [511, 1], [2, 3, 7, 8, 9, 63, 64, 65, 127, 128]], ids=str
    )
    @torch.no_grad()
    def test_the_real_minilm_computes_what_transformers_computes_at_any_length(self, minilm_twins, lengths):
        ours, theirs = minilm_twins
        texts = random_texts(lengths, 30522)
        torch.testing.assert_close(
            run_packed(ours, texts), run_padded(theirs, texts), **tolerance(torch.float32)
        )

    @torch.no_grad()
    def test_bert_base_under_its_historical_names_computes_what_transformers_computes(self, base_twins):
        ours, theirs = base_twins
        texts = random_texts([70, 1, 2, 31, 17, 8, 9, 64, 3, 30], 2000)
        torch.testing.assert_close(
            run_packed(ours, texts, filler=7),
            run_padded(theirs, texts),
            **tolerance(torch.float32, "encoder"),
        )

    @pytest.mark.parametrize("start", range(1, 513, 64))
    @torch.no_grad()
    def test_every_length_from_1_to_512(self, thin_twins, start: int):
        ours, theirs = thin_twins
        texts = random_texts(list(range(start, start + 64)), TINY.vocab_size)
        torch.testing.assert_close(
            run_packed(ours, texts), run_padded(theirs, texts), **tolerance(torch.float64)
        )

    @given(
        lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20),
        filler=st.integers(0, 70),
        seed=st.integers(0, 99),
    )
    @settings(max_examples=50, deadline=None)
    @torch.no_grad()
    def test_any_batch_in_any_order_with_any_filler(
        self, tiny_twins, lengths: list[int], filler: int, seed: int
    ):
        ours, theirs = tiny_twins
        texts = random_texts(lengths, TINY.vocab_size, seed)
        torch.testing.assert_close(
            run_packed(ours, texts, filler), run_padded(theirs, texts), **tolerance(torch.float64)
        )

    @pytest.mark.parametrize(
        ("heads", "hidden", "layers", "types"), [(1, 32, 1, 1), (2, 14, 3, 2), (32, 32, 1, 5), (3, 39, 2, 2)]
    )
    @torch.no_grad()
    def test_other_shapes(self, heads: int, hidden: int, layers: int, types: int):
        config = replace(
            TINY,
            num_attention_heads=heads,
            hidden_size=hidden,
            intermediate_size=17,
            num_hidden_layers=layers,
            type_vocab_size=types,
            layer_norm_eps=0.1,
        )
        ours, theirs = twins(config, std=0.3)
        texts = [(ids, [i % types for i in ids]) for ids, _ in random_texts([5, 13, 1], TINY.vocab_size)]
        torch.testing.assert_close(
            run_packed(ours, texts), run_padded(theirs, texts), **tolerance(torch.float64)
        )


class TestGradients:
    def test_of_every_parameter_are_transformers_in_fp64(self, tiny_twins):
        texts = random_texts([5, 40, 1, 17, 8, 33, 2, 3, 9, 24, 16], TINY.vocab_size)
        ours, theirs = tiny_twins
        assert_gradients_equal(
            gradients(lambda m, t: run_packed(m, t, filler=13), ours, texts),
            gradients(run_padded, theirs, texts),
            allowed=tolerance(torch.float64)["atol"],
        )

    def test_of_the_real_minilm_are_transformers(self, minilm: Path, minilm_twins):
        texts = [(e.input_ids, e.token_type_ids) for e in Tokenizer(minilm, 64, 30522)(SENTENCES)]
        ours, theirs = minilm_twins
        fp32 = gradients(run_packed, ours, texts), gradients(run_padded, theirs, texts)
        exact = gradients(run_padded, deepcopy(theirs).double(), texts)
        allowed = tolerance(torch.float64)["atol"]
        assert_gradients_equal(gradients(run_packed, deepcopy(ours).double(), texts), exact, allowed)
        scales = {name: grad.norm() for name, grad in exact.items() if not name.endswith("key.bias")}

        def together(grads: dict[str, Tensor]) -> Tensor:
            """Every tensor counts alike; a key's bias, which is 0 but for rounding, not at all."""
            return torch.cat(
                [(grads[name] / scale.to(grads[name])).flatten() for name, scale in scales.items()]
            )

        assert_as_near(*map(together, fp32), together(exact))

    def test_of_bert_base_are_transformers(self, base_twins):
        texts = random_texts([12, 1, 5, 8, 3, 2, 9, 4, 6], 2000)
        ours, theirs = base_twins
        assert_gradients_equal(
            gradients(lambda m, t: run_packed(m, t, filler=5), ours, texts),
            gradients(run_padded, theirs, texts),
            allowed=tolerance(torch.float32, "encoder")["atol"],
        )

    def test_filler_neither_changes_nor_receives_anything(self, tiny_twins):
        bert, _ = tiny_twins
        sequences = Sequences((3, 5), filler=4)
        results = []
        for filler_id in (11, 12):
            bert.zero_grad()
            ids = torch.tensor([2, 5, 3, 2, 6, 7, 8, 3] + [filler_id] * 4)
            hidden = bert(ids, torch.zeros_like(ids), sequences)[:8]
            hidden.square().sum().backward()
            results.append(
                (hidden.detach(), [p.grad.clone() for p in bert.parameters() if p.grad is not None])
            )
            assert bert.embeddings.word_embeddings.weight.grad[filler_id].count_nonzero() == 0
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


class TestFrozen:
    """Nothing is kept or computed for gradients where nothing trains."""

    def count_saved(self, bert: Bert) -> tuple[Tensor, int]:
        """The hidden states, and how many tensors were kept for a backward pass."""
        saved = []

        def keep(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            texts = random_texts([5, 9, 1, 17, 8, 33, 2, 3, 9, 24], TINY.vocab_size)
            hidden, pooled = run_packed(bert, texts, filler=3)
        return torch.cat([*hidden, pooled]), len(saved)

    def test_a_frozen_encoder_keeps_no_tensor(self):
        hidden, saved = self.count_saved(Bert(TINY).requires_grad_(False))
        assert not hidden.requires_grad
        assert hidden.grad_fn is None
        assert saved == 0

    def test_layers_below_the_first_that_trains_keep_no_tensor(self):
        bert = Bert(replace(TINY, num_hidden_layers=4)).requires_grad_(False)
        kept = []
        for layer in reversed(bert.encoder["layer"]):
            layer.output.dense.weight.requires_grad_(True)
            kept.append(self.count_saved(bert)[1])
        steps = [b - a for a, b in itertools.pairwise([0, *kept])]
        assert 0 < steps[0] < steps[1] == steps[2] == steps[3]

    def test_only_what_trains_gets_a_gradient(self):
        bert = Bert(TINY).requires_grad_(False)
        trained = {"encoder.layer.1.attention.self.query.weight", "encoder.layer.1.output.LayerNorm.bias"}
        for name in trained:
            bert.get_parameter(name).requires_grad_(True)
        self.count_saved(bert)[0].square().sum().backward()
        assert {name for name, p in bert.named_parameters() if p.grad is not None} == trained


class TestDropout:
    def test_eval_and_train_without_dropout_are_the_same(self):
        bert = Bert(replace(TINY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
        texts = random_texts([5, 9], TINY.vocab_size)
        torch.testing.assert_close(
            run_packed(bert.train(), texts), run_packed(bert.eval(), texts), rtol=0, atol=0
        )

    @pytest.mark.parametrize(("of_hidden", "of_attention"), [(0.5, 0.0), (0.0, 0.5)])
    def test_each_rate_is_the_configs_and_acts_in_training_only(self, of_hidden: float, of_attention: float):
        config = replace(TINY, hidden_dropout_prob=of_hidden, attention_probs_dropout_prob=of_attention)
        bert = Bert(config)
        for name, module in bert.named_modules():
            if isinstance(module, nn.Dropout):
                assert module.p == (of_attention if name.endswith("self.dropout") else of_hidden), name
        texts = random_texts([5, 9], TINY.vocab_size)
        before = {name: tensor.clone() for name, tensor in bert.state_dict().items()}
        kept, again = (run_packed(bert.eval(), texts)[1] for _ in range(2))
        assert torch.equal(kept, again)
        assert not torch.allclose(run_packed(bert.train(), texts)[1], kept)
        assert all(torch.equal(tensor, before[name]) for name, tensor in bert.state_dict().items())

    def test_dropout_stands_where_transformers_puts_it(self):
        theirs = transformers.BertModel(transformers.BertConfig(**asdict(TINY)))
        places = [
            {name for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
            for model in (Bert(TINY), theirs)
        ]
        assert places[0] == places[1]

    def test_dropout_acts_on_probabilities_before_residuals_and_after_the_embeddings_norm(self):
        """With a rate of 1 what is dropped is 0, and the rest can be said in one line."""
        bert = Bert(replace(TINY, num_hidden_layers=1)).double()
        randomize(bert, std=0.3)
        x, sequences = torch.randn(9, 32, dtype=torch.float64), Sequences((4, 5))
        bert.embeddings.dropout.p = 1.0
        ids = torch.arange(9)
        assert bert.embeddings(ids, ids * 0, sequences.position_ids).count_nonzero() == 0
        layer = bert.encoder["layer"][0]
        layer.attention["self"].dropout.p = 1.0
        assert torch.equal(layer.attention["self"](x, sequences), torch.zeros_like(x))
        layer.attention["output"].dropout.p = layer.output.dropout.p = 1.0
        norms = (layer.attention["output"].LayerNorm, layer.output.LayerNorm)
        torch.testing.assert_close(layer(x, sequences), norms[1](norms[0](x)), **tolerance(torch.float64))


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @torch.no_grad()
    def test_half_precision_computes_nearly_what_fp32_computes(self, minilm: Path, minilm_twins, dtype):
        """As nearly as transformers does with all its weights in that dtype, and within the tolerance."""
        bert, theirs = minilm_twins
        texts = [(e.input_ids, e.token_type_ids) for e in Tokenizer(minilm, 128, 30522)(SENTENCES)]
        expected, pooled = run_padded(deepcopy(theirs).double(), texts)
        other, other_pooled = run_padded(deepcopy(theirs).to(dtype), texts)
        bert.compute_dtype = dtype
        try:
            hidden, half_pooled = run_packed(bert, texts)
        finally:
            bert.compute_dtype = None
        assert {h.dtype for h in hidden} == {dtype}
        assert half_pooled.dtype == torch.float32
        exact = torch.cat(expected)
        assert_as_near(torch.cat(hidden), torch.cat(other), exact)
        assert_as_near(half_pooled, other_pooled.float(), pooled)
        assert error(torch.cat(hidden), exact) <= TOLERANCE[dtype, "encoder"]

    def test_weights_that_train_stay_fp32_and_so_do_their_gradients(self):
        bert = Bert(TINY)
        bert.compute_dtype = torch.bfloat16
        hidden, pooled = run_packed(bert, random_texts([5, 9], TINY.vocab_size))
        (torch.cat(hidden).float().sum() + pooled.sum()).backward()
        assert (
            {p.dtype for p in bert.parameters()}
            == {p.grad.dtype for p in bert.parameters()}
            == {torch.float32}
        )

    def test_weights_held_in_bf16_compute_what_fp32_masters_cast_to_bf16_compute(self):
        bert = Bert(TINY).eval()
        for parameter in bert.parameters():
            parameter.data = parameter.data.bfloat16().float()
        texts = random_texts([5, 9], TINY.vocab_size)
        bert.compute_dtype = torch.bfloat16
        masters, _ = run_packed(bert, texts)
        held, _ = run_packed(bert.bfloat16(), texts)
        torch.testing.assert_close(masters, held, **tolerance(torch.bfloat16))


class TestSequences:
    @given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=25), filler=st.integers(0, 5))
    @settings(deadline=None)
    def test_positions_count_from_each_first_token(self, lengths: list[int], filler: int):
        sequences = Sequences(tuple(lengths), filler)
        positions = [i for length in lengths for i in range(length)]
        assert sequences.position_ids.tolist() == positions + [0] * filler
        assert sequences.first.tolist() == [i for i, position in enumerate(positions) if position == 0]
        assert sequences.counts.tolist() == lengths

    @given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=25))
    @settings(deadline=None)
    def test_blocks_hold_every_sequence_once(self, lengths: list[int]):
        blocks = Sequences(tuple(lengths), filler=3).blocks
        first_rows = [sum(lengths[:i]) for i in range(len(lengths))]
        found = []
        for block in blocks:
            T = block.rows.shape[1]
            for rows, inside in zip(block.rows.tolist(), block.inside.tolist(), strict=True):
                i = first_rows.index(rows[0])
                own = lengths[i]
                found.append(i)
                assert T % 16 == 0
                assert own <= T
                assert inside == [t < own for t in range(T)]
                assert rows == [first_rows[i] + min(t, own - 1) for t in range(T)]
            assert (block.beyond is None) == block.inside.all()
            assert block.beyond is None or torch.equal(block.beyond[:, 0, 0] == 0, block.inside)
            assert block.beyond is None or torch.equal(block.beyond[:, 0, 0].isneginf(), ~block.inside)
            assert torch.equal(block.asks[:, 0, :, 0], block.inside)
        assert sorted(found) == list(range(len(lengths)))

    @given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=60))
    @settings(deadline=None)
    def test_sequences_of_one_multiple_of_16_share_a_block_and_few_join_the_next(self, lengths: list[int]):
        padded_to = {i: T for T, members in block_sizes(lengths) for i in members}
        above = None
        for least in sorted({next_multiple(length, 16) for length in lengths}, reverse=True):
            members = [i for i, length in enumerate(lengths) if next_multiple(length, 16) == least]
            joins = above is not None and len(members) * (above**2 - least**2) <= SPARED
            above = above if joins else least
            assert {padded_to[i] for i in members} == {above}

    @pytest.mark.parametrize(
        ("length", "most"), [(16, 128), (17, 32), (64, 8), (96, 3), (128, 2), (129, 1), (500, 1)]
    )
    def test_a_block_of_long_sequences_holds_fewer_of_them(self, length: int, most: int):
        blocks = Sequences((length,) * 200).blocks
        assert [len(block.rows) for block in blocks[:-1]] == [most] * (len(blocks) - 1)
        assert sum(len(block.rows) for block in blocks) == 200

    @given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=25), filler=st.integers(0, 3))
    @settings(deadline=None)
    def test_a_grid_spreads_rows_over_blocks_and_heads_and_gathers_them_again(
        self, lengths: list[int], filler: int
    ):
        sequences, N, D = Sequences(tuple(lengths), filler), 3, 2
        grid = sequences.grid(N)
        x = torch.randn(sum(lengths) + filler, N * D)
        parts = grid.spread(x)
        for block, part in zip(sequences.blocks, parts, strict=True):
            assert torch.equal(part, x[block.rows].unflatten(-1, (N, D)).transpose(1, 2))
        cells = grid.empty(x)
        for into, part in zip(grid.split(cells), parts, strict=True):
            into.copy_(part)
        back = grid.gather(cells, x)
        assert torch.equal(back[: sum(lengths)], x[: sum(lengths)])
        assert back[sum(lengths) :].count_nonzero() == 0

    @given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=25), filler=st.integers(0, 3))
    @settings(deadline=None)
    def test_padded_rows_end_in_zeros(self, lengths: list[int], filler: int):
        x = torch.randn(sum(lengths) + filler, 2)
        padded = Sequences(tuple(lengths), filler).padded(x)
        assert padded.shape == (len(lengths), max(lengths), 2)
        for i, length in enumerate(lengths):
            assert torch.equal(padded[i, :length], x[sum(lengths[:i]) :][:length])
            assert padded[i, length:].count_nonzero() == 0

    def test_a_forward_changes_no_argument(self):
        bert, sequences = Bert(TINY), Sequences((3, 4), filler=1)
        ids, types = torch.arange(8), torch.zeros(8, dtype=torch.int32)
        bert(ids, types, sequences)
        assert ids.tolist() == list(range(8))
        assert types.tolist() == [0] * 8
        assert (sequences.lengths, sequences.filler) == ((3, 4), 1)
