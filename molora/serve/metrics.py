"""What the server counts and measures, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from molora.serve.engine import Engine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)


class RequestMetrics:
    """The metrics of a server, whoever answers."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "molora_requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        self.adapters = Counter("molora_adapters", "Answers by the adapters that ran.", ["adapters"], registry=registry)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)


class Metrics(RequestMetrics):
    """The metrics of a server that answers by an engine."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        registry = self.registry
        self.answers = Counter("molora_answers", "Answers by what ended them.", ["finished"], registry=registry)
        self.tokens = Counter(
            "molora_tokens", "Tokens of prompts (media among them) and of answers.", ["kind"], registry=registry
        )
        self.first_token = Histogram(
            "molora_first_token_seconds", "From a request to its first token.", buckets=_SECONDS, registry=registry
        )
        self.answer = Histogram(
            "molora_answer_seconds", "From a request to the end of an answer.", buckets=_SECONDS, registry=registry
        )
        batch = engine.batch
        free = Gauge("molora_free_pages", "Pages for keys and values that no answer holds.", registry=registry)
        free.set_function(lambda: min(batch.pool.num_free.values()))
        Gauge("molora_running", "Answers that hold pages.", registry=registry).set_function(lambda: batch.num_running)
        waiting = Gauge("molora_waiting", "Answers that wait for encoders or pages.", registry=registry)
        waiting.set_function(lambda: engine.num_waiting)
