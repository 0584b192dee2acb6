"""One client's work in one round: train, test the personalised model, embed, report."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedamole.accounting import epsilon_after
from fedamole.backbone import load_backbone, load_tokenizer
from fedamole.batches import Batch, LocalTraining, collate, rows_of_round
from fedamole.datasets.tokens import TokenStore
from fedamole.device_meter import DeviceMeter, trainable_numbers
from fedamole.dp_sgd import GivenGradients, train_privately
from fedamole.embeddings import Embedded, embed_client
from fedamole.errors import ClientError, FedamoleError
from fedamole.evaluation import Score, accuracy, evaluation_loss, rouge_of_answers
from fedamole.forms import MIXTURE, Form
from fedamole.packing import PackedClient, PackedResult, train_pack
from fedamole.planning.memory import pack_tokens
from fedamole.planning.model_size import model_size
from fedamole.pools import ClientState, KeptState, Upload
from fedamole.privacy import perturb_embedded
from fedamole.stages import ClientStage
from fedamole.training import (
    FUSED_ADAM,
    ScoredModel,
    TrainingRecord,
    engine_for,
    learning_rate,
    sharded_for_testing,
    train,
    trained_tensors,
)

logger = logging.getLogger(__name__)
# Names under which configs of transformers keep the dropout of a backbone.
BACKBONE_DROPOUTS = {"dropout", "attention_dropout", "hidden_dropout", "activation_dropout"}
BACKBONE_DROPOUTS |= {"resid_pdrop", "attn_pdrop", "embd_pdrop"}


@dataclass
class ClientSession:
    """What the clients of one job share: backbone, tokenizer, data, settings.

    Attributes
    ----------
    settings
        Of the run and the evaluation.
    folder
        The prepared backbone.
    store
        Tokens of the scenario.
    device
        Of this rank.
    """

    settings: ClientStage
    folder: Path
    store: TokenStore
    device: torch.device

    def __post_init__(self) -> None:
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(
            self.folder, self.settings.run.backbone
        )
        self._backbone: PreTrainedModel | None = None
        self.meter = DeviceMeter(self.device)
        # What clients of a pack have trained, until their turn to be tested comes.
        self.trained_in_pack: dict[int, PackedResult | ClientError] = {}

    def backbone(self) -> PreTrainedModel:
        """The frozen model; it is loaded once."""
        if self._backbone is None:
            self._backbone = self._load_backbone()
        return self._backbone

    def _load_backbone(self) -> PreTrainedModel:
        with self.meter.phase("loading"):
            return load_backbone(self.folder, self.settings.run.backbone)

    def training_rows(self, client: int, with_embedding_set: bool) -> np.ndarray:
        """Rows that a client trains on: its own, or those of all clients where data are pooled."""
        clients = self.store.clients
        mine = clients if self.settings.run.population.pooled else [clients[client]]
        parts = [
            (rows.train, rows.embedding) if with_embedding_set else (rows.train,) for rows in mine
        ]
        return np.concatenate([part for rows in parts for part in rows])

    @contextlib.contextmanager
    def personalised(
        self, state: ClientState, form: Form = MIXTURE, sharded: bool = False
    ) -> Iterator[nn.Module]:
        """Give the backbone with a client's adapters; take them out again at the end.

        Parameters
        ----------
        state
            What the client holds.
        form
            What the state is in the model.
        sharded
            Whether ZeRO-3 will cut the model into slices: then it stays on the CPU until DeepSpeed
            moves it piece by piece, and serves this client only.
        """
        alone = self._load_backbone() if sharded else None
        model = form.insert(alone or self.backbone(), state, self.settings.run.adapter)
        try:
            yield model if sharded else model.to(self.device)
        finally:
            form.remove(model)


@dataclass(frozen=True)
class ClientReport:
    """Metrics of one client in one round.

    Attributes
    ----------
    eval_loss
        Mean token loss on the evaluation set, in nats.
    score
        On the test set.
    num_train, num_eval, num_test
        Examples of each set.
    training
        None if nothing was trained.
    epsilon, delta
        Differential privacy spent so far; None without.
    """

    eval_loss: float
    score: Score
    num_train: int
    num_eval: int
    num_test: int
    training: TrainingRecord | None
    epsilon: float | None = None
    delta: float | None = None

    def to_mapping(self) -> dict[str, Any]:
        """Content of the metrics file: no times, so that equal runs give equal bytes."""
        trained = self.training
        spent = {} if self.epsilon is None else {"epsilon": self.epsilon, "delta": self.delta}
        return {
            "eval_loss": self.eval_loss,
            "score": self.score.value,
            "answers": self.score.answers,
            "num_train": self.num_train,
            "num_eval": self.num_eval,
            "num_test": self.num_test,
            "steps": trained.steps if trained else None,
            "train_loss_first": trained.loss_first if trained else None,
            "train_loss_last": trained.loss_last if trained else None,
            **spent,
        }


@dataclass(frozen=True, eq=False)
class Start:
    """What a client's training starts from.

    Attributes
    ----------
    state
        The tensors.
    with_embedding_set
        Whether to train on the embedding set too: methods that need none give it to training.
    optimizer
        A fresh one in every round.
    """

    state: ClientState
    with_embedding_set: bool
    optimizer: Callable[..., torch.optim.Optimizer] = FUSED_ADAM


@dataclass(frozen=True, eq=False)
class Trained:
    """A model right after its local training.

    Attributes
    ----------
    client, round
        Whose, and in which round.
    scored
        Gives losses; in evaluation mode.
    state
        The trained tensors.
    record
        How the training went.
    num_train
        Examples that it trained on.
    """

    client: int
    round: int
    scored: ScoredModel
    state: ClientState
    record: TrainingRecord
    num_train: int


@dataclass(frozen=True, eq=False)
class ClientResult:
    """What comes out of a client's work in a round.

    Attributes
    ----------
    upload
        What the server gets.
    report
        Metrics.
    kept
        What the client keeps for its next round; None for a method without such state.
    """

    upload: Upload
    report: ClientReport
    kept: KeptState | None = None


@contextlib.contextmanager
def locally_trained(
    session: ClientSession,
    client: int,
    round_: int,
    start: Start,
    form: Form = MIXTURE,
) -> Iterator[Trained]:
    """Train a client's model; it can be tested as long as the context is open.

    A client that was trained in a pack (:func:`train_packed`) is only made ready to be tested.

    Parameters
    ----------
    session
        Backbone, data and settings.
    client
        Index of the client.
    round_
        Round, from 1.
    start
        What the training starts from.
    form
        What the state is in the model.

    Raises
    ------
    ClientError
        If the client has no examples, or its training diverges.
    """
    run = session.settings.run
    settings = run.training
    rows = _rows_to_train(session, client, round_, start)
    packed = session.trained_in_pack.pop(client, None)
    if isinstance(packed, ClientError):
        raise packed
    if packed:
        _check_tensors(packed.state, round_, client)
        with session.personalised(packed.state, form) as model:
            session.meter.count(trainable=trainable_numbers(model))
            scored = form.scored(model, run.adapter.balance_weight).eval()
            yield Trained(client, round_, scored, packed.state, packed.record, len(rows))
        return
    num_steps = run.steps_of(client, len(rows))
    private = run.privacy.dp_sgd
    # A delta that is too large for this client is refused before its training, not after it.
    epsilon_after(run, client, round_, len(rows))
    with session.personalised(start.state, form, sharded=settings.zero_stage == 3) as model:
        session.meter.count(trainable=trainable_numbers(model))
        scored = form.scored(model, run.adapter.balance_weight)
        rate = learning_rate(settings, round_)
        trainable = GivenGradients(scored) if private else scored
        with engine_for(trainable, settings, rate, start.optimizer) as engine:
            place = LocalTraining(run.seed, round_, client)
            if private:
                record = train_privately(
                    engine,
                    lambda index: _batch(session.store, rows[index : index + 1]),
                    len(rows),
                    num_steps,
                    place,
                    settings,
                    private,
                    session.device,
                )
            else:
                steps = _micro_batches(session, rows, num_steps, place)
                record = train(engine, steps, num_steps, place, settings, session.device)
            trained = form.extract(trained_tensors(engine, settings.zero_stage), start.state)
            _check_tensors(trained, round_, client)
            yield Trained(client, round_, scored.eval(), trained, record, len(rows))


def train_packed(session: ClientSession, round_: int, starts: Mapping[int, Start]) -> None:
    """Train clients at once; :func:`locally_trained` then has them ready, one after another.

    Parameters
    ----------
    session
        Backbone, data and settings.
    round_
        Round, from 1.
    starts
        Client -> what its training starts from; all with the same optimizer. A client without
        examples is left out.

    Raises
    ------
    FedamoleError
        If the backbone has dropout of its own: it would be drawn for all clients together.
    """
    run = session.settings.run
    session.trained_in_pack = {}
    clients = []
    for client, start in starts.items():
        rows = session.training_rows(client, start.with_embedding_set)
        if len(rows):
            steps = run.steps_of(client, len(rows))
            clients.append(PackedClient(client, start.state, rows, steps))
    if not clients:
        return
    backbone = session.backbone()
    _check_no_dropout(backbone, run.backbone.name)
    backbone.to(session.device)  # type: ignore[arg-type]
    optimizer = next(iter(starts.values())).optimizer
    most_tokens = pack_tokens(run, model_size(run.backbone, session.folder))
    session.trained_in_pack = train_pack(
        backbone, clients, round_, run, session.store, session.device, optimizer, most_tokens
    )


def _check_no_dropout(backbone: PreTrainedModel, name: str) -> None:
    """Refuse a backbone whose layers drop something in training."""
    dropped = [m.p for m in backbone.modules() if isinstance(m, torch.nn.Dropout)]
    settings = backbone.config.get_text_config().to_dict()
    dropped += [value for key, value in settings.items() if key in BACKBONE_DROPOUTS and value]
    if any(dropped):
        raise FedamoleError(
            f"backbone {name}: has dropout of its own ({max(dropped)}), which a pack would draw "
            "for all its clients together; training: pack_clients must be 1"
        )


def _rows_to_train(session: ClientSession, client: int, round_: int, start: Start) -> np.ndarray:
    """Rows that a client trains on.

    Raises
    ------
    ClientError
        If there are none.
    """
    rows = session.training_rows(client, start.with_embedding_set)
    if not len(rows):
        raise ClientError(f"{_name(session, round_, client)} has no training examples")
    return rows


def report_of(session: ClientSession, trained: Trained) -> ClientReport:
    """Test a model right after its training.

    Raises
    ------
    ClientError
        If its evaluation loss is not finite.
    """
    with session.meter.phase("testing"):
        report = _test(
            session,
            trained.client,
            trained.round,
            trained.scored,
            trained.record,
            trained.num_train,
        )
    if not np.isfinite(report.eval_loss):
        raise _diverged(trained.round, trained.client, f"eval loss {report.eval_loss}")
    name = _name(session, trained.round, trained.client)
    logger.info("%s: %s; %s", name, _trained(trained.record), _tested(session, report))
    return report


def upload_of(
    trained: Trained, embedded: Embedded | None = None, state: ClientState | None = None
) -> Upload:
    """Make what a client sends.

    Parameters
    ----------
    trained
        The trained model.
    embedded
        Embeddings of the client's data; None for a method that needs none.
    state
        What of the trained tensors is sent; default: all.
    """
    embedded = embedded or Embedded.nothing()
    return Upload(
        client=trained.client,
        round=trained.round,
        state=trained.state if state is None else state,
        num_examples=trained.num_train,
        client_embeddings_MR=embedded.client_MR,
        expert_embeddings=embedded.experts,
        tokens=_tokens_by_group(trained.record, trained.state) if embedded.experts else {},
    )


def embeddings_of(session: ClientSession, trained: Trained) -> Embedded:
    """Embed a client's embedding set with its trained experts; noisy where privacy asks for it."""
    run = session.settings.run
    with session.meter.phase("embedding"):
        embedded = embed_client(
            trained.scored,
            session.store,
            session.store.clients[trained.client].embedding,
            trained.state,
            session.settings.evaluation.batch_size,
            session.device,
        )
    if run.privacy.embeddings is None:
        return embedded
    names = (run.seed, trained.round, trained.client)
    return perturb_embedded(embedded, trained.state, run.privacy.embeddings, *names)


def evaluate_client(
    session: ClientSession, client: int, round_: int, state: ClientState, form: Form = MIXTURE
) -> ClientReport:
    """Test a model on a client's data without training it; see :func:`locally_trained`."""
    settings = session.settings.run.training
    sharded = settings.zero_stage == 3
    with session.personalised(state, form, sharded) as model:
        scored = form.scored(model, 0.0)
        with sharded_for_testing(scored, settings) if sharded else contextlib.nullcontext():
            num_train = len(session.training_rows(client, with_embedding_set=True))
            report = _test(session, client, round_, scored.eval(), None, num_train)
    logger.info("%s: %s", _name(session, round_, client), _tested(session, report))
    return report


def _name(session: ClientSession, round_: int, client: int) -> str:
    """What a log line is about."""
    return f"{session.settings.run.label} round {round_} client {client}"


def _trained(record: TrainingRecord) -> str:
    """How a training went, for the log."""
    losses = (record.loss_first, record.loss_last)
    first, last = ("none" if loss is None else f"{loss:.3f}" for loss in losses)
    speed = record.steps / record.seconds
    return f"{record.steps} steps, {speed:.2f} steps/s, loss {first} -> {last}"


def _tested(session: ClientSession, report: ClientReport) -> str:
    """Results of a test for the log."""
    metric = session.settings.run.scenario.dataset.metric
    return f"eval loss {report.eval_loss:.3f}, {metric} {report.score.value:.3f}"


def _check_tensors(trained: ClientState, round_: int, client: int) -> None:
    """Refuse a model that the last step has spoilt; the losses of training came before it."""
    for group in trained.groups.values():
        for array in (*group.experts.values(), *group.shared.values()):
            if not np.isfinite(array).all():
                raise _diverged(round_, client, "a tensor is not")


def _diverged(round_: int, client: int, what: str) -> ClientError:
    return ClientError(
        f"round {round_} client {client}: the trained model is not finite ({what}); "
        "try a lower training: learning_rate, or gradient_clipping"
    )


def _micro_batches(
    session: ClientSession, rows: np.ndarray, num_steps: int, place: LocalTraining
) -> Iterator[list[Batch]]:
    """Make the micro-batches of each step."""
    for step in rows_of_round(rows, num_steps, place, session.settings.run.training):
        yield [_batch(session.store, rows) for rows in step]


def _batch(store: TokenStore, rows: np.ndarray) -> Batch:
    """Make one batch of rows of the token store."""
    prompts = [store.prompt_length(row) for row in rows]
    return collate([store.ids(row) for row in rows], prompts, store.pad_id)


def _test(
    session: ClientSession,
    client: int,
    round_: int,
    scored: ScoredModel,
    training: TrainingRecord | None,
    num_train: int,
) -> ClientReport:
    """Measure evaluation loss and score, and what has been spent of the client's privacy."""
    rows, store, device = session.store.clients[client], session.store, session.device
    settings = session.settings.evaluation
    loss = evaluation_loss(scored, store, rows.eval, settings.batch_size, device)
    if session.settings.run.scenario.dataset.task == "classification":
        score = accuracy(scored, store, rows.test, settings.batch_size, device)
    else:
        model, tokenizer = scored.model, session.tokenizer
        score = rouge_of_answers(model, tokenizer, store, rows.test, settings, device)
    run = session.settings.run
    return ClientReport(
        eval_loss=loss,
        score=score,
        num_train=num_train,
        num_eval=len(rows.eval),
        num_test=len(rows.test),
        training=training,
        epsilon=epsilon_after(run, client, round_, num_train),
        delta=run.privacy.dp_sgd.delta if run.privacy.dp_sgd else None,
    )


def _tokens_by_group(record: TrainingRecord, state: ClientState) -> dict[str, np.ndarray]:
    """Tokens routed to each expert row of the state during training, (N,) int64 by group."""
    return {
        name: np.concatenate([record.routed_tokens[module] for module in group.modules])
        for name, group in state.groups.items()
        if group.experts
    }
