"""One client's work in one round: train, test the personalised model, embed, report."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedamole.adapters import extract_state, insert_adapters, remove_adapters
from fedamole.backbone import load_backbone, load_tokenizer
from fedamole.batches import Batch, collate, stream_of_examples
from fedamole.datasets.tokens import TokenStore
from fedamole.embeddings import Embedded, embed_client
from fedamole.errors import ClientError
from fedamole.evaluation import Score, accuracy, evaluation_loss, rouge_of_answers
from fedamole.partition import ClientSplit
from fedamole.pools import ClientState, Upload
from fedamole.stages import ClientStage
from fedamole.training import (
    LocalTraining,
    ScoredModel,
    TrainingRecord,
    engine_for,
    learning_rate,
    sharded_for_testing,
    steps_per_round,
    train,
    trained_tensors,
)

logger = logging.getLogger(__name__)


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

    @contextlib.contextmanager
    def personalised(self, state: ClientState, sharded: bool = False) -> Iterator[nn.Module]:
        """Give the backbone with a client's adapters; take them out again at the end.

        Parameters
        ----------
        state
            What the client holds.
        sharded
            Whether ZeRO-3 will cut the model into slices: then it stays on the CPU until DeepSpeed
            moves it piece by piece, and serves this client only.
        """
        backbone = self._backbone or load_backbone(self.folder, self.settings.run.backbone)
        if not sharded:
            self._backbone = backbone
        model = insert_adapters(backbone, state, self.settings.run.adapter)
        try:
            yield model if sharded else model.to(self.device)
        finally:
            remove_adapters(model)


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
    """

    eval_loss: float
    score: Score
    num_train: int
    num_eval: int
    num_test: int
    training: TrainingRecord | None

    def to_mapping(self) -> dict[str, Any]:
        """Content of the metrics file: no times, so that equal runs give equal bytes."""
        trained = self.training
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
        }


def train_client(
    session: ClientSession, client: int, round_: int, state: ClientState
) -> tuple[Upload, ClientReport]:
    """Train a client's adapters, test the result and embed the client's data.

    Parameters
    ----------
    session
        Backbone, data and settings.
    client
        Index of the client.
    round_
        Round, from 1.
    state
        What the client got from the server.
    """
    settings = session.settings.run.training
    rows = session.store.clients[client]
    train_rows = training_rows(rows, state)
    if not len(train_rows):
        raise ClientError(f"{_name(session, round_, client)} has no training examples")
    num_steps = steps_per_round(settings, len(train_rows))
    steps = _micro_batches(session, client, round_, train_rows, num_steps)
    with session.personalised(state, sharded=settings.zero_stage == 3) as model:
        scored = ScoredModel(model, session.settings.run.adapter.balance_weight)
        with engine_for(scored, settings, learning_rate(settings, round_)) as engine:
            place = LocalTraining(session.settings.run.seed, round_, client)
            record = train(engine, steps, num_steps, place, settings, session.device)
            trained = extract_state(trained_tensors(engine, settings.zero_stage), state)
            scored.eval()
            report = _test(session, client, scored, record, len(train_rows))
            _check_finite(report, trained, round_, client)
            embedded = _embed(session, rows, scored, trained)
    logger.info(
        "%s: %d steps, %.2f steps/s, loss %.3f -> %.3f; %s",
        _name(session, round_, client),
        record.steps,
        record.steps / record.seconds,
        record.loss_first,
        record.loss_last,
        _tested(session, report),
    )
    upload = Upload(
        client=client,
        round=round_,
        state=trained,
        num_examples=len(train_rows),
        client_embeddings_MR=embedded.client_MR,
        expert_embeddings=embedded.experts,
        tokens=_tokens_by_group(record, trained),
    )
    return upload, report


def evaluate_client(
    session: ClientSession, client: int, round_: int, state: ClientState
) -> ClientReport:
    """Test a model on a client's data without training it; see :func:`train_client`."""
    settings = session.settings.run.training
    sharded = settings.zero_stage == 3
    num_train = len(training_rows(session.store.clients[client], state))
    with session.personalised(state, sharded) as model:
        scored = ScoredModel(model, balance_weight=0.0)
        with sharded_for_testing(scored, settings) if sharded else contextlib.nullcontext():
            report = _test(session, client, scored.eval(), None, num_train)
    logger.info("%s: %s", _name(session, round_, client), _tested(session, report))
    return report


def _name(session: ClientSession, round_: int, client: int) -> str:
    """What a log line is about."""
    return f"{session.settings.run.label} round {round_} client {client}"


def _tested(session: ClientSession, report: ClientReport) -> str:
    """Results of a test for the log."""
    metric = session.settings.run.scenario.dataset.metric
    return f"eval loss {report.eval_loss:.3f}, {metric} {report.score.value:.3f}"


def training_rows(rows: ClientSplit, state: ClientState) -> np.ndarray:
    """Rows to train on: without domain experts nothing is embedded, so that set trains as well."""
    if state.has_experts:
        return rows.train
    return np.concatenate([rows.train, rows.embedding])


def _check_finite(report: ClientReport, trained: ClientState, round_: int, client: int) -> None:
    """Refuse a model that the last step has spoilt; the losses of training came before it."""
    arrays = [
        array
        for group in trained.groups.values()
        for array in (*group.experts.values(), *group.shared.values())
    ]
    if not np.isfinite(report.eval_loss) or not all(np.isfinite(array).all() for array in arrays):
        raise ClientError(
            f"round {round_} client {client}: the trained model is not finite (eval loss "
            f"{report.eval_loss}); try a lower training: learning_rate, or gradient_clipping"
        )


def _micro_batches(
    session: ClientSession, client: int, round_: int, rows: np.ndarray, num_steps: int
) -> Iterator[list[Batch]]:
    """Cut the client's part of the example stream for this round into steps and passes."""
    settings, store = session.settings.run.training, session.store
    per_step, per_pass = settings.batch_size, settings.sequences_per_pass
    order = rows[
        stream_of_examples(
            len(rows),
            (round_ - 1) * num_steps * per_step,
            round_ * num_steps * per_step,
            session.settings.run.seed,
            client,
        )
    ]

    def batch(chosen: np.ndarray) -> Batch:
        prompts = [store.prompt_length(row) for row in chosen]
        return collate([store.ids(row) for row in chosen], prompts, store.pad_id)

    for start in range(0, len(order), per_step):
        passes = range(start, start + per_step, per_pass)
        yield [batch(order[at : at + per_pass]) for at in passes]


def _test(
    session: ClientSession,
    client: int,
    scored: ScoredModel,
    training: TrainingRecord | None,
    num_train: int,
) -> ClientReport:
    """Measure evaluation loss and score."""
    rows, store, device = session.store.clients[client], session.store, session.device
    settings = session.settings.evaluation
    loss = evaluation_loss(scored, store, rows.eval, settings.batch_size, device)
    if session.settings.run.scenario.dataset.task == "classification":
        score = accuracy(scored, store, rows.test, settings.batch_size, device)
    else:
        model, tokenizer = scored.model, session.tokenizer
        score = rouge_of_answers(model, tokenizer, store, rows.test, settings, device)
    return ClientReport(loss, score, num_train, len(rows.eval), len(rows.test), training)


def _embed(
    session: ClientSession, rows: ClientSplit, scored: ScoredModel, trained: ClientState
) -> Embedded:
    """Embed the client's embedding set; nothing without domain experts."""
    if not trained.has_experts:
        return Embedded.nothing()
    batch_size = session.settings.evaluation.batch_size
    store, device = session.store, session.device
    return embed_client(scored, store, rows.embedding, trained, batch_size, device)


def _tokens_by_group(record: TrainingRecord, state: ClientState) -> dict[str, np.ndarray]:
    """Tokens routed to each expert row of the state during training, (N,) int64 by group."""
    return {
        name: np.concatenate([record.routed_tokens[module] for module in group.modules])
        for name, group in state.groups.items()
        if group.experts
    }
