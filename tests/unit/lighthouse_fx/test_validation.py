"""Validation: its figures against ones worked out by hand, and models made so that each answer must come out."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_models import CONFIG, WIDTH, Model, causal, functional, twin
from torch import nn

import lighthouse_fx
from lighthouse_fx import LighthouseConfig, Passkey, validate
from lighthouse_fx.evaluation.passkey import find_passkeys
from lighthouse_fx.evaluation.validation_result import Inference, Paired
from lighthouse_fx.frontend.as_trained import AsTrained

N = 64
CPU = torch.device("cpu")


class Language(nn.Module):
    """Blocks between an embedding of bytes and logits; `wrap` is what it returns them in."""

    def __init__(self, layers=2, attend=None, wrap=lambda logits: logits):
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.blocks = Model(layers, attend)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(WIDTH, 256)
        self.wrap = wrap

    def forward(self, ids):  # [B, N]
        return self.wrap(self.head(self.drop(self.blocks(self.embed(ids)))))


class Told(nn.Module):
    """No network: logits worked out by a function of the token numbers, `[B, N]` to `[B, N, 256]`."""

    def __init__(self, tell):
        super().__init__()
        self.tell = tell

    def forward(self, ids):
        return self.tell(ids)


def tokens(windows=3, length=N):
    return torch.randint(256, (windows, length + 1))


def losses(logits, data):
    """Cross-entropy written out, `[B, N]`."""
    chosen = logits.log_softmax(-1).gather(-1, data[:, 1:, None])
    return -chosen.squeeze(-1)


def with_attention(model, attend):
    other = Language(len(model.blocks.layers), attend).double()
    other.load_state_dict(model.state_dict())
    return other.eval()


# --- the Lighthouse forward -------------------------------------------------------------------------------------------


def test_forward_as_trained_is_the_functional_form():
    model = Model(3).double()
    x = torch.randn(2, N, WIDTH, dtype=torch.float64)
    oracle = twin(model, functional())
    call = AsTrained(model.eval(), CONFIG)
    with lighthouse_fx.dense():  # the stage does not matter
        out = call(x)
    torch.testing.assert_close(out, oracle(x), rtol=1e-12, atol=1e-12)
    assert not out.requires_grad and [c.rewritten for c in call.calls] == [True] * 3
    other = torch.randn(1, N + 5, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(call(other), oracle(other), rtol=1e-12, atol=1e-12)
    assert [c.length for c in call.calls] == [N + 5] * 3, "those of the last call"


def test_forward_as_trained_takes_the_options_that_the_model_is_compiled_with():
    model = Model(4).double()
    lighthouse_fx.compile(model, CONFIG, dense_layers=(0, -1))
    oracle = Model(4).double()
    oracle.load_state_dict(model.state_dict())
    for block in (oracle.layers[1], oracle.layers[2]):
        block.attn.attend = functional()
    call = AsTrained(model.eval())
    x = torch.randn(2, N, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(call(x), oracle(x), rtol=1e-12, atol=1e-12)
    assert [c.rewritten for c in call.calls] == [False, True, True, False]


def test_what_stays_dense_in_training_stays_dense():
    mask = torch.rand(N, N).tril() > 0.5
    mask.fill_diagonal_(True)
    masked = Model(1, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)).double()
    call = AsTrained(masked.eval(), CONFIG)
    x = torch.randn(2, N, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(call(x), masked(x), rtol=1e-12, atol=1e-12)
    assert [c.rewritten for c in call.calls] == [False] and "attn_mask" in call.calls[0].reason


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, None), lambda x: type("Out", (), {"logits": x})()])
def test_losses(wrap):
    model = Language(wrap=wrap).double()
    model.blocks.eval()  # a mixture of modes, to be left as it is
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = tokens()
    found = validate(model, data, config=CONFIG, batch=2, check_inference=False)

    dense = losses(with_attention(model, causal)(data[:, :-1]), data)
    lighthouse = losses(with_attention(model, functional())(data[:, :-1]), data)
    assert found.dense_loss == pytest.approx(dense.mean().item(), abs=1e-6)  # cross-entropy is taken in float32
    assert found.lighthouse_loss == pytest.approx(lighthouse.mean().item(), abs=1e-6)
    assert abs(found.dense_loss - found.lighthouse_loss) > 1e-4, "otherwise this shows nothing"
    gaps = (dense - lighthouse).mean(dim=1)
    assert found.gap.mean == pytest.approx(gaps.mean().item(), abs=1e-6)
    assert found.gap.error == pytest.approx(gaps.std().item() / 3**0.5, abs=1e-6)
    last = N // 4
    short = losses(with_attention(model, causal)(data[:, N // 2 : -1]), data[:, N // 2 :])[:, -last:]
    assert found.context_gain.mean == pytest.approx((short - dense[:, -last:]).mean().item(), abs=1e-6)
    edges = [(at.start, at.end) for at in found.positions]
    assert edges == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (32, 64)]
    for at in found.positions:
        assert at.dense == pytest.approx(dense[:, at.start : at.end].mean().item(), abs=1e-6)
        assert at.lighthouse == pytest.approx(lighthouse[:, at.start : at.end].mean().item(), abs=1e-6)
    assert (found.windows, found.length, found.inference, found.passkey) == (3, N, None, None)

    assert model.training and not model.blocks.training and not model.blocks.layers[0].attn.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batches_may_come_one_by_one():
    model = Language()
    data = tokens(4)
    whole = validate(model, data, config=CONFIG, check_inference=False)
    parts = validate(model, iter(data.int().split(2)), config=CONFIG, check_inference=False)
    assert parts.dense_loss == pytest.approx(whole.dense_loss) and parts.gap.mean == pytest.approx(whole.gap.mean)


def test_where_nothing_is_rewritten_there_is_no_lighthouse_loss():
    found = validate(Language(), tokens(), config=LighthouseConfig.paper(), check_inference=False)
    assert found.lighthouse_loss is None and found.gap is None and all(at.lighthouse is None for at in found.positions)
    (finding,) = [finding for finding in found.findings if "trained" in finding.question]
    assert finding.answer == "no" and "no better than guessing, 5.5452" in finding.text
    assert "not worth it" in replace(found, dense_loss=1.0).findings[0].text


def test_without_a_configuration_it_is_the_default():
    found = validate(Language(), tokens(), check_inference=False)
    assert found.config == LighthouseConfig() and found.lighthouse_loss is not None


# --- answers ----------------------------------------------------------------------------------------------------------


def answer(found, word):
    (finding,) = [finding for finding in found.findings if word in finding.question]
    return finding.answer


def sure(ids):
    """Logits that are all for one token."""
    return 20.0 * F.one_hot(ids, 256).float()


@pytest.mark.slow
@pytest.mark.parametrize("compile_blocks", [False, True])
def test_inference_is_dense(compile_blocks):
    model = Language(3)
    if compile_blocks:
        lighthouse_fx.compile(model, CONFIG, dense_layers=(0, -1))
    found = validate(model, tokens(), config=None if compile_blocks else CONFIG)
    assert found.passed and answer(found, "inference") == "yes"
    assert (found.inference.calls, found.inference.rewritten) == (3, 0)
    assert sum(call.rewritten for call in found.calls) == (1 if compile_blocks else 3)


@pytest.mark.slow
def test_a_model_that_does_not_heed_eval_is_found_out():
    class Stubborn(Language):
        def train(self, mode=True):
            return self

        def forward(self, ids):
            with torch.enable_grad():
                return self.head(self.blocks(self.embed(ids)))

    found = validate(lighthouse_fx.compile(Stubborn(3), CONFIG, dense_layers=(0,), strict=False), tokens())
    assert found.inference.rewritten == 2 and found.inference.difference > found.inference.tolerance
    assert not found.passed and answer(found, "inference") == "no"


@pytest.mark.parametrize(
    "difference, rewritten, passed", [(0.5, 0, True), (1.5, 0, False), (0.0, 1, False), (math.nan, 0, False)]
)
def test_inference_check(difference, rewritten, passed):
    assert Inference(difference=difference, tolerance=1.0, calls=2, rewritten=rewritten).passed is passed


def test_a_longer_context_helps_a_model_that_copies_from_afar():
    half = torch.randint(256, (4, N // 2 + N // 4))
    data = torch.cat([half, half], dim=1)[:, : N + 1]  # what comes in the last quarter came before, 48 tokens ago
    apart = half.shape[1]

    def copy(ids):
        logits = torch.zeros(*ids.shape, 256)
        if ids.shape[1] > apart - 1:
            logits[:, apart - 1 :] = sure(ids[:, : ids.shape[1] - apart + 1])
        return logits

    found = validate(Told(copy), data, check_inference=False)
    assert answer(found, "context") == "yes"
    assert found.context_gain.mean == pytest.approx(math.log(256), abs=1e-3)
    assert answer(validate(Told(lambda ids: sure(ids)), data, check_inference=False), "context") == "unclear"


def test_a_loss_that_is_no_number_fails():
    found = validate(Told(lambda ids: torch.full((*ids.shape, 256), math.nan)), tokens(), check_inference=False)
    assert not found.passed and answer(found, "trained") == "no"


def test_a_model_that_has_learnt_nothing_is_not_trained():
    """Whichever of its losses is lower."""
    for seed in range(4):
        torch.manual_seed(seed)
        found = validate(Language(), tokens(windows=8), config=LighthouseConfig(topk=8), check_inference=False)
        assert answer(found, "trained") == "no" and found.guessing == pytest.approx(math.log(256))


@pytest.mark.parametrize("windows, sign", [(1, 0), (2, 0), (4, 0), (5, 1), (8, 1)])
def test_few_windows_prove_less(windows, sign):
    assert Paired(mean=0.3, error=0.1, windows=windows).sign == sign


@pytest.mark.parametrize("mean, error, sign", [(1.0, 0.4, 1), (-1.0, 0.4, -1), (1.0, 0.6, 0), (1.0, math.inf, 0), (0.0, 0, 0)])
def test_two_standard_errors_count(mean, error, sign):
    assert Paired(mean=mean, error=error, windows=8).sign == sign


# --- passkeys ---------------------------------------------------------------------------------------------------------

SAID = b"The pass key is "


def text_of(prompt):
    return bytes(prompt).decode()


def test_prompts():
    task = Passkey(lengths=(300, 512), depths=5)
    assert task.places == (0.0, 0.25, 0.5, 0.75, 1.0) and task.answers() == list(b"0123456789")
    for length in task.lengths:
        places = []
        for depth in task.places:
            prompt = task.prompt(length=length, depth=depth, digit=7, trial=1)
            text = text_of(prompt)
            assert len(prompt) == length and text.endswith("What is the pass key? The pass key is ")
            assert text.count("7") == 2 and not any(digit in text for digit in "012345689")
            places.append(text.index("The pass key is 7."))
        assert places == sorted(places) and places[0] == 0
        assert "7 is the pass key. What is" in text_of(prompt), "at depth 1 the question follows at once"
        near = [abs(place - depth * places[-1]) for place, depth in zip(places, task.places, strict=True)]
        assert max(near) <= 40, "between two sentences, so about half of one off"
    first, second = (task.prompt(length=512, depth=0.5, digit=7, trial=trial) for trial in (1, 3))
    assert first == task.prompt(length=512, depth=0.5, digit=7, trial=1)
    assert len({tuple(task.prompt(length=512, depth=0.5, digit=7, trial=t)) for t in range(8)}) > 1 and second


def reader(reach):
    """A model that finds the digit if it is among the last `reach` bytes, and otherwise says 3."""

    def tell(ids):
        answers = []
        for row in ids.tolist():
            seen = bytes(row[-reach:])[: -len(SAID)]
            place = seen.find(SAID)
            answers.append(seen[place + len(SAID)] if place >= 0 else ord("3"))
        logits = torch.zeros(*ids.shape, 256)
        logits[:, :, ord("x")] = 99.0  # larger than any digit's, and none
        logits[:, -1] += sure(torch.tensor(answers))
        return logits

    return Told(tell)


def test_retrieval():
    task = Passkey(lengths=(400, 800), batch=3)
    everything = find_passkeys(reader(10_000), task, device=CPU)
    assert everything.accuracy == 1.0 and len(everything.found) == 2 and len(everything.found[0]) == 7
    nothing = find_passkeys(reader(60), task, device=CPU)
    assert {cell for row in nothing.found for cell in row} == {0.1}, "always 3, which is right one time in ten"
    near = find_passkeys(reader(400), task, device=CPU)
    assert near.found[0] == (1.0,) * 7
    assert near.found[1] == (0.1,) * 3 + near.found[1][3:4] + (1.0,) * 3


def test_passkeys_in_the_verdict(tmp_path):
    data = torch.randint(256, (2, 401))
    found = validate(reader(10_000), data, passkey=Passkey(lengths=(400,), depths=3), check_inference=False)
    assert answer(found, "passkey") == "yes" and found.passkey.accuracy == 1.0
    assert answer(validate(reader(60), data, passkey=Passkey(lengths=(400,)), check_inference=False), "passkey") == "no"
    written = found.save(tmp_path / "deep" / "folder")
    assert [path.name for path in written] == ["validation.json", "position_loss.png", "passkey.png"]
    saved = json.loads(written[0].read_text(), parse_constant=pytest.fail)
    assert saved["passkey"]["found"] == [[1.0, 1.0, 1.0]] and saved["passed"] is True
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])
    assert "100%" in str(found) and "Are passkeys found?" in str(found)


def test_tokens_of_a_tokenizer():
    words = {}

    def encode(text):  # a word and the space before it are one token
        return [words.setdefault(word, len(words)) for word in text.replace(".", " .").split()]

    task = Passkey(lengths=(60,), encode=encode, start=(9999,))
    assert task.answers() == [words[str(digit)] for digit in range(10)]
    prompt = task.prompt(length=60, depth=1.0, digit=4, trial=0)
    assert len(prompt) == 60 and prompt[0] == 9999 and prompt.count(words["4"]) == 2 and prompt[-1] == words["is"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"lengths": ()}, "lengths=() asks nothing"),
        ({"lengths": (20,)}, "lengths has 20, and a prompt without filler has"),
        ({"lengths": (400,), "depths": 0}, "depths=0 is below 1"),
        ({"lengths": (400,), "encode": lambda text: [1, 2, 3]}, "encode gives the ten digits the tokens"),
    ],
)
def test_bad_passkeys(arguments, said):
    with pytest.raises(ValueError) as raised:
        Passkey(**arguments)
    assert said in str(raised.value)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, said",
    [
        (torch.zeros(3), r"data has shape \[3\]: give token numbers"),
        (torch.zeros(2, 9), r"data has \[\d, 9\] of torch.float32: give token numbers"),
        (torch.zeros(2, 1, dtype=torch.long), r"data has windows of \[1\] tokens"),
        ([torch.zeros(1, 5, dtype=torch.long), torch.zeros(1, 6, dtype=torch.long)], r"windows of \[5, 6\] tokens"),
        ([], r"data has windows of \[\] tokens: give at least one window"),
        (7, "data is a int"),
    ],
)
def test_bad_data(data, said):
    with pytest.raises(ValueError, match=said):
        validate(Language(), data)


def test_documents_are_not_silently_left_out():
    numbers = (torch.arange(N) // 32).expand(3, N)
    with lighthouse_fx.documents(numbers), pytest.raises(RuntimeError) as raised:
        validate(Language(), tokens(), config=CONFIG)
    assert "inside documents(), documents [3, 64], which the uncompiled model ignores" in str(raised.value)


def test_bad_arguments():
    with pytest.raises(TypeError, match="model=3 is a int"):
        validate(3, tokens())
    with pytest.raises(TypeError, match="config='x' is a str"):
        validate(Language(), tokens(), config="x")
    with pytest.raises(ValueError, match="batch=0"):
        validate(Language(), tokens(), batch=0)
    model = Told(lambda ids: ids)
    with pytest.raises(TypeError, match=r"returned a tensor \[1, 64\] of torch.int64 .* it has to return logits"):
        validate(model, tokens())
    assert model.training, "the mode is put back after an error, too"
