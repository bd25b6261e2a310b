"""Calling the model, loss, streamers, dtypes by any name, and arguments that cannot be."""

import json
from threading import Thread

import mindspore as ms
import numpy as np
import pytest
from helpers.causal_calls import PROMPT, log_probability, new_tokens, tensor
from helpers.tiny_llm import KV_MEMORY, make_folder

import codellama_rt as clrt
from codellama_rt.hf.tensors import label_loss


def test_loss_is_that_of_transformers():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 4, 9)).astype(np.float32)
    labels = np.array([[3, 1, -100, 2], [0, -100, -100, 8]])
    shifted = logits[:, :-1].reshape(-1, 9).astype(np.float64)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    wanted = labels[:, 1:].reshape(-1)
    picked = [log_probs[i, label] for i, label in enumerate(wanted) if label >= 0]
    assert abs(label_loss(logits, labels) + np.mean(picked)) < 1e-6
    assert np.isnan(label_loss(logits, np.full((2, 4), -100)))


def test_calling_the_model(model):
    ids = tensor([PROMPT])
    output = model(ids, labels=ids)
    assert np.array_equal(output.logits.asnumpy()[0], model.llm.logits(PROMPT))
    expected = -log_probability(model, PROMPT[:1], PROMPT[1:]) / (len(PROMPT) - 1)
    assert abs(float(output.loss.asnumpy()) - expected) < 1e-5
    last = model.forward(ids, logits_to_keep=2)
    assert np.array_equal(last.logits.asnumpy(), output.logits.asnumpy()[:, -2:])
    assert last.loss is None
    assert model.construct(ids).logits.shape == (1, len(PROMPT), 512)
    assert model.eval() is model


def tokenizer_of(model):
    class Decoder:
        decode = staticmethod(model.llm.tokenizer.decode)

    return Decoder


def test_a_streamer_gets_prompt_and_tokens(model):
    calls = []

    class Recorder:
        def put(self, value):
            calls.append(np.asarray(value).tolist())

        def end(self):
            calls.append("end")

    new = new_tokens(model, PROMPT, streamer=Recorder(), max_new_tokens=4, eos_token_id=[])
    assert calls == [[PROMPT], *([token_id] for token_id in new), "end"]


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_an_iterator_is_fed_from_a_thread(model, skip_prompt):
    streamer = clrt.TextIteratorStreamer(tokenizer_of(model), skip_prompt, timeout=60)
    thread = Thread(
        target=model.generate, args=(tensor([PROMPT]),),
        kwargs={"streamer": streamer, "max_new_tokens": 6, "eos_token_id": []},
    )  # fmt: skip
    thread.start()
    pieces = list(streamer)
    thread.join()
    printed = []
    printer = clrt.TextStreamer(tokenizer_of(model), skip_prompt)
    printer.on_finalized_text = lambda text, stream_end=False: printed.append(text)
    new_tokens(model, PROMPT, streamer=printer, max_new_tokens=6, eos_token_id=[])
    assert pieces == printed


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_pieces_of_an_iterator_are_those_of_transformers(shared_dir, skip_prompt):
    folder = shared_dir / "data"
    tokenizer = clrt.CodeLlamaTokenizer.from_pretrained(folder / "tokenizer" / "codellama-32016")
    cases = json.loads((folder / "golden" / "tok_stream.json").read_text("utf-8"))["cases"]
    for case in cases:
        cut = case["prompt_len_skipped"] if skip_prompt else 0
        streamer = clrt.TextIteratorStreamer(tokenizer, skip_prompt, skip_special_tokens=True)
        for value in ([np.array([case["ids"][:cut]])] * skip_prompt) + case["ids"][cut:]:
            streamer.put(value)
        streamer.end()
        assert list(streamer) == case["chunks_skip_prompt" if skip_prompt else "chunks"]


class TorchDtype:
    def __str__(self):
        return "torch.float16"


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [("dtype", "float32", "float32"), ("mindspore_dtype", ms.bfloat16, "bfloat16"),
     ("ms_dtype", ms.float16, "float16"), ("torch_dtype", TorchDtype(), "float16"),
     ("torch_dtype", "auto", "bfloat16")],
)  # fmt: skip
def test_dtypes_have_several_names(tmp_path, name, dtype, expected):
    options = {name: dtype, "kv_memory": KV_MEMORY, "attn_implementation": "flash_attention_2"}
    made = clrt.LlamaForCausalLM.from_pretrained(make_folder(tmp_path / "model"), **options)
    with made.llm:
        assert made.config.dtype == expected


class Silent:
    def put(self, value):
        pass

    def end(self):
        pass


def test_options_that_cannot_be(tmp_path):
    folder = make_folder(tmp_path / "model")
    with pytest.raises(TypeError, match="dtype is given 2 times"):
        clrt.LlamaForCausalLM.from_pretrained(folder, dtype="float32", ms_dtype=ms.float32)
    with pytest.raises(ValueError, match="attn_implementation must be one of eager"):
        clrt.LlamaForCausalLM.from_pretrained(folder, attn_implementation="ring")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"assistant_modell": 1}, TypeError, "no argument assistant_modell"),
        ({"prompt_lookup_num_tokens": 4}, TypeError, "open the model with speculation='suffix'"),
        ({"assistant_model": 1}, TypeError, "support assistant_model: speculative decoding"),
        ({"guidance_scale": 1.5}, TypeError, "does not support guidance_scale: combine"),
        ({"output_attentions": True}, TypeError, "does not support output_attentions"),
        ({"inputs_embeds": np.ones((1, 2, 3))}, TypeError, "does not support inputs_embeds"),
        ({"inputs": tensor([PROMPT])}, TypeError, "two names of one argument"),
        ({"num_return_sequences": 2}, ValueError, "greedy search has one result"),
        ({"num_beams": 2, "num_return_sequences": 3}, ValueError, "2 beams cannot give"),
        ({"max_length": 3}, ValueError, "leaves none of max_length=3"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 1.5}, TypeError, "max_new_tokens must be an int"),
        ({"temperature": -1.0, "do_sample": True}, ValueError, "temperature"),
        ({"typical_p": 2.0}, ValueError, "typical_p must be from 0 to 1"),
        ({"early_stopping": "soon"}, ValueError, "early_stopping must be bool or 'never'"),
        ({"bad_words_ids": [[]]}, ValueError, "must not contain an empty list"),
        ({"stop_strings": [1]}, TypeError, "stop_strings must be"),
        ({"eos_token_id": "a"}, TypeError, "eos_token_id must be"),
        ({"eos_token_id": 512}, ValueError, "eos_token_id must be a token id in"),
        ({"pad_token_id": -1}, ValueError, "pad_token_id must be a token id in"),
        ({"suppress_tokens": list(range(512))}, ValueError, "no token can come next"),
        ({"suppress_tokens": list(range(512)), "num_beams": 2}, ValueError, "no token can come"),
        (
            {"suppress_tokens": list(range(512)), "num_beams": 2, "do_sample": True},
            ValueError,
            "no token can come",
        ),
        (
            {
                "suppress_tokens": list(range(511)),
                "num_beams": 2,
                "max_new_tokens": 1,
                "num_return_sequences": 2,
                "eos_token_id": [],
            },
            ValueError,
            "leave 1 continuations",
        ),
        ({"prefix_allowed_tokens_fn": lambda i, ids: []}, ValueError, "returned no token"),
        ({"prefix_allowed_tokens_fn": lambda i, ids: [512]}, ValueError, r"ids in \[0, 512\)"),
        ({"prefix_allowed_tokens_fn": lambda i, ids: ["a"]}, TypeError, "must return token ids"),
        ({"max_time": "1"}, TypeError, "max_time must be a number"),
        ({"max_time": float("nan")}, ValueError, "max_time must be finite"),
        ({"length_penalty": None, "sequence_bias": {(1,): "a"}}, TypeError, "sequence_bias must"),
        ({"sequence_bias": [5]}, TypeError, "sequence_bias must map runs"),
        ({"sequence_bias": {(): 1.0}}, ValueError, "sequence_bias must not contain an empty"),
        ({"exponential_decay_length_penalty": 1}, TypeError, r"must be \(start, factor\)"),
        ({"exponential_decay_length_penalty": (-1, 2.0)}, ValueError, r"\[0\] must be at least 0"),
        ({"forced_eos_token_id": "a"}, TypeError, "forced_eos_token_id must be"),
        ({"logits_processor": [lambda i, s: s[:, :3]]}, ValueError, "must return scores of shape"),
        ({"streamer": Silent(), "num_beams": 2}, ValueError, "a streamer shows one row"),
        ({"attention_mask": np.array([[1, 1, 1, 1, 0]])}, ValueError, "padded on the left"),
        ({"attention_mask": np.array([[1, 0, 1, 1, 1]])}, ValueError, "one run of tokens"),
        ({"attention_mask": np.array([[0] * 5])}, ValueError, "one run of tokens"),
        ({"attention_mask": np.ones((1, 4))}, ValueError, r"attention_mask must be \(1, 5\)"),
    ],
)
def test_arguments_that_cannot_be(model, options, error, words):
    with pytest.raises(error, match=words):
        model.generate(tensor([PROMPT]), **options)


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        ([[1.5]], TypeError, "Tensor of int32 or int64"),
        ([1, 2], ValueError, r"must be \(batch, length\)"),
        ([[]], TypeError, "int32"),
        ([[1, 600]], ValueError, r"token id in \[0, 512\)"),
    ],
)
def test_ids_that_cannot_be(model, ids, error, words):
    for call in (model.generate, model):
        with pytest.raises(error, match=words):
            call(ms.Tensor(np.array(ids)))


def test_labels_that_cannot_be(model):
    ids = tensor([PROMPT])
    for labels, words in [
        (tensor([PROMPT[:2]]), "like input_ids"), (tensor([[600] * 5]), "token ids below 512"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            model(ids, labels=labels)
    with pytest.raises(TypeError, match="labels must be a Tensor"):
        model(ids, labels=ms.Tensor(np.ones((1, 5), np.float32)))
