"""EleutherAI's lm-evaluation-harness on any run, model or adapter.

    import lm_eval
    from mlx_posttrain.evaluation.lm_eval import MLXPosttrainLM

    lm_eval.simple_evaluate(model=MLXPosttrainLM("runs/sft"), tasks=["hellaswag"])

With ``apply_chat_template=True`` questions use the template that the run was trained with. Importing this
module also registers its name with the harness: ``simple_evaluate(model="mlx-posttrain",
model_args="pretrained=runs/sft,engine=mlx", ...)``. Results equal those of the harness's own ``hf`` model,
except for ``loglikelihood_rolling`` where a tokenizer begins texts with a BOS: here BOS comes before the text
once and is not scored, as in likelihood.base_text_loss.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mlx_posttrain.data import templates
from mlx_posttrain.data.batches import by_length
from mlx_posttrain.data.tokens import eos_id, stop_ids
from mlx_posttrain.data.types import Turn
from mlx_posttrain.engines import decoding
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation import likelihood
from mlx_posttrain.generation.model import template_for
from mlx_posttrain.models.open import open_model

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise UserError("lm-evaluation-harness is not installed: pip install lm-eval") from None

_UNBOUNDED = 2048  # window of a model that states no longest sequence, as in the harness
# the harness's names for one setting; the first wins
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("until", "do_sample", "temperature", "top_p", *_LENGTHS)
# settings that have no effect with these values
_NEUTRAL = {"top_k": (0, None), "num_beams": (1,), "repetition_penalty": (1.0,)}


@register_model("mlx-posttrain")
class MLXPosttrainLM(TemplateLM):
    """A model behind the harness's interface: log-likelihoods of texts, and continuations.

    pretrained: anything that names a model, see models/source.py. batch_size: number of rows scored at once
    at most, and fewer where they are long. max_length: longest sequence in tokens, by default the model's
    context. max_gen_toks: length of continuations where the task states none.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        engine: str = "auto",
        dtype: str | None = None,
        batch_size: int | str = 32,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
    ):
        super().__init__()
        self.model, self.tokenizer, self.source = open_model(pretrained, engine, dtype)
        self.seed, self.max_gen_toks = seed, max_gen_toks
        self.batch_size = 32 if batch_size == "auto" else int(batch_size)
        longest = self.model.context or self.model.config.get("max_position_embeddings") or _UNBOUNDED
        self.max_length = int(max_length or longest)
        if self.model.context is not None and self.max_length > self.model.context:
            raise UserError(
                f"max_length={self.max_length} is longer than the model's context of {self.model.context}"
            )

    # text and tokens

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return eos_id(self.tokenizer)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context: BOS, or EOS where the tokenizer has none."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text.

        By default they include the tokenizer's special tokens, unless the text already begins with BOS.
        """
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    @property
    def tokenizer_name(self) -> str:
        """Key of the harness's request cache: the tokenizer and the template."""
        return f"{self.source.folder}__{template_for(self.source, self.tokenizer, None)[0]}".replace(
            "/", "__"
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Name of the template that ``apply_chat_template`` fills in; None if the harness wants none."""
        return template_for(self.source, self.tokenizer, None)[0] if chat_template else None

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The turns in the template that the run was trained with, up to where the answer begins.

        Without ``add_generation_prompt`` the last turn is the beginning of an answer that is to be continued.
        """
        turns = [Turn(m["role"], m["content"]) for m in chat_history]  # type: ignore[arg-type]
        prefix = "" if add_generation_prompt else turns.pop().content
        template, templated = template_for(self.source, self.tokenizer, None)
        segments = templates.render_prompt(turns, template, self.tokenizer, templated=templated)
        lead = (
            templates.TEMPLATES[template].lead
            if prefix and templated and template in templates.TEMPLATES
            else ""
        )
        return "".join(s.text + self.tokenizer.eos_token * s.closes for s in segments) + lead + prefix

    # likelihood

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether each of its tokens is the most likely one).

        requests: (texts, context, continuation) each. The beginning of the context is cut off where both do
        not fit. Raises UserError for a continuation that does not fit by itself.
        """
        rows = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens does not fit a window of {self.max_length}"
                )
            sequence = np.array([*context, *continuation][-(self.max_length + 1) :], np.int32)
            inputs, targets = sequence[:-1], sequence[1:]
            rows.append((inputs, targets, np.arange(len(targets)) >= len(targets) - len(continuation)))
        results = [(0.0, True)] * len(rows)
        for group in by_length(
            [len(inputs) for inputs, _, _ in rows], self.batch_size, likelihood.TOKEN_BUDGET
        ):
            scored = [i for i in group if rows[i][2].any()]
            if not scored:
                continue
            batch = likelihood.make_batch([rows[i] for i in scored], self.model.context)
            (values,) = self.model.apply(likelihood.target_and_top, [batch])
            real = batch.mask > 0
            sums = np.bincount(batch.row[real], values["logprobs"][real].astype(np.float64), len(scored))
            misses = np.bincount(batch.row[real], values["top"][real] != batch.target[real], len(scored))
            for i, total, missed in zip(scored, sums.tolist(), misses.tolist(), strict=True):
                results[i] = (total, missed == 0)
        for (texts, _, _), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text.

        Windows are those of the harness: disjoint, but the last one begins early enough to be full.
        """
        parts, owner = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(
                ids, self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            ):
                parts.append((None, *make_disjoint_window(window)))
                owner.append(number)
        sums = [0.0] * len(requests)
        for number, (total, _) in zip(owner, self._loglikelihood_tokens(parts), strict=True):
            sums[number] += total
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    # continuations

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each context, cut before the first of its ``until`` strings.

        The beginning of a context is cut off where it leaves no room for the answer. A sampled text depends
        on ``seed`` and on the requests. Raises UserError for a setting that decoding here does not support,
        or an answer as long as the model's context.
        """
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
        texts = [""] * len(requests)
        for members in groups.values():
            settings = requests[members[0]].args[1]
            max_tokens, temperature, top_p = self._decoding(settings)
            until = settings.get("until") or []
            until = [until] if isinstance(until, str) else list(until)
            room = self.max_length - max_tokens
            prompts = {
                i: (self.tok_encode(requests[i].args[0]) or [self.prefix_token_id])[-room:] for i in members
            }
            # rows that decode together are padded to the longest
            order = sorted(members, key=lambda i: len(prompts[i]))
            completions = decoding.in_batches(
                self.model,
                [prompts[i] for i in order],
                max_tokens=max_tokens,
                stop=stop_ids(self.tokenizer),
                temperature=temperature,
                top_p=top_p,
                seed=self.seed,
            )
            for i, completion in zip(order, completions, strict=True):
                texts[i] = _cut(self.tokenizer.decode(completion.tokens, skip_special_tokens=True), until)
                self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
        return texts

    def _decoding(self, settings: Mapping[str, Any]) -> tuple[int, float, float]:
        """(max_tokens, temperature, top_p) of a task's generation settings."""
        unknown = {k: v for k, v in settings.items() if k not in _SAMPLING and v not in _NEUTRAL.get(k, ())}
        if unknown:
            raise UserError(
                f"the task's generation_kwargs set {unknown}, which decoding here does not support: "
                "override them in gen_kwargs"
            )
        lengths = [settings[name] for name in _LENGTHS if settings.get(name) is not None]
        max_tokens = int(lengths[0]) if lengths else self.max_gen_toks
        if not 1 <= max_tokens < self.max_length:
            raise UserError(
                f"max_gen_toks={max_tokens} must lie between 1 and {self.max_length - 1}, as the model's "
                f"window is {self.max_length} tokens: override it with gen_kwargs"
            )
        temperature = float(settings.get("temperature") or 0.0)
        if settings.get("do_sample") is False:
            temperature = 0.0
        return max_tokens, temperature, float(settings.get("top_p") or 1.0)


def _cut(text: str, until: Iterable[str]) -> str:
    """The text before the first occurrence of any of the strings."""
    for mark in until:
        text = text.split(mark, 1)[0] if mark else text
    return text
