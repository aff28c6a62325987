"""A judge that is a language model, run by the same engine as everything else: raw prompt, full attention, one question at a time."""

from dataclasses import dataclass

from macbench_kernels import UnsupportedError, kernels
from tqdm import tqdm

from macbench import cli
from macbench.engine import Engine
from macbench.errors import ConfigError, choose
from macbench.judging.base import Verdict
from macbench.methods.full import Full
from macbench.models.weights import load, load_chat, max_context, resolve_device
from macbench.sampling import Sampling


@dataclass
class LlmJudge:
    """``model``: an option of conf/model; ``path``: other weights for it. Sampling as LongGenBench does it, each question seeded alike.

    An answer is not generated further once it is settled; that changes no verdict.
    """

    model: str = "llama31_8b"
    path: str | None = None
    temperature: float = 0.95
    top_p: float = 0.95
    max_tokens: int = 50
    seed: int = 42
    backend: str = "auto"

    name = "llm"

    def __post_init__(self):
        choose("judge.model", str(self.model), cli.options("model"))
        if not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise ConfigError("judge.max_tokens", self.max_tokens, "must be an integer of at least 1")
        self._sampling = Sampling(self.temperature, self.top_p, seed=self.seed)
        self._spec = cli.load_option("model", self.model)
        if self.path is not None:
            self._spec.path = self.path

    def prepare(self) -> None:
        try:
            self._most = max_context(self._spec)
        except ConfigError as error:
            raise ConfigError("judge.model", self.path or self.model, f"{error.allowed} (judge=lexical needs no model)") from error

    def facts(self) -> dict:
        names = ("model", "path", "temperature", "top_p", "max_tokens", "seed")
        return {"judge": self.name} | {name: getattr(self, name) for name in names if name != "path" or self.path is not None}

    def ask(self, questions, device, settled):
        self.prepare()
        device = resolve_device(device)
        chat = load_chat(self._spec)
        model = load(self._spec, device, chat)
        prompts = [chat.encode(question.prompt) for question in questions]
        ctx = min(max(map(len, prompts)) + self.max_tokens, self._most)
        try:
            engine = Engine(model.network, kernels(self.backend, device), ctx)
        except UnsupportedError as error:
            raise ConfigError("judge.backend", self.backend, str(error)) from error
        method = Full()
        for index, ids in enumerate(tqdm(prompts, unit="question", desc="judge", dynamic_ncols=True)):
            yield index, self._answer(engine, model, method, ids, settled)

    def _answer(self, engine: Engine, model, method: Full, ids: list[int], settled) -> Verdict:
        if len(ids) + self.max_tokens > engine.ctx:
            return Verdict(None, f"the question has {len(ids)} tokens, the judge holds {engine.ctx - self.max_tokens}")
        decode = model.chat.decode
        prompt = engine.prefill(ids)
        try:
            sampler = self._sampling.sampler()
            made = engine.decode(prompt, method, self.max_tokens, model.stop_ids, sampler=sampler, ended=lambda tokens: settled(decode(tokens)))
        finally:
            prompt.free()
        return Verdict(decode(made.tokens))
