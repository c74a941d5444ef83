"""BERT: an encoder with absolute positions.

Source: Devlin et al., "BERT: pre-training of deep bidirectional transformers", arXiv:1810.04805. The tree has the names
that Transformers gives its modules. All hidden states are (batch, length, hidden_size), float32 (float64 for a model
in float64).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _core
from ..nn import Dropout, Embedding, Linear, Module, ModuleList
from .base import PreTrainedModel, norm
from .config import ModelConfig
from .outputs import ModelOutput

_DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "classifier_dropout": None,
}

# Transformers' names of activations → the kernels' names.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "linear": "none",
}


class BertEmbeddings(Module):
    """The sum of word, position and segment embeddings, normalised."""

    def __init__(self, config: ModelConfig, dtype: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = Embedding(config.vocab_size, width, padding_idx=config.pad_token_id, dtype=dtype)
        self.position_embeddings = Embedding(config.max_position_embeddings, width, dtype=dtype)
        self.token_type_embeddings = Embedding(config.type_vocab_size, width, dtype=dtype)
        self.LayerNorm = norm(width, config, dtype)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(
        self, words: np.ndarray, token_type_ids: np.ndarray | None, position_ids: np.ndarray | None
    ) -> np.ndarray:
        # Without ids of their own every row has the same ones: look them up once and broadcast.
        length = words.shape[1]
        types = np.zeros((1, length), np.int64) if token_type_ids is None else token_type_ids
        places = np.arange(length)[None] if position_ids is None else position_ids
        words += self.token_type_embeddings(types)
        words += self.position_embeddings(places)
        return self.dropout(self.LayerNorm(words))


class BertSelfAttention(Module):
    """Multi-head attention of the sequence to itself. `rows` are the tokens that a result is wanted for, or all."""

    def __init__(self, config: ModelConfig, dtype: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        self.query = Linear(width, width, dtype=dtype)
        self.key = Linear(width, width, dtype=dtype)
        self.value = Linear(width, width, dtype=dtype)
        self.dropout = Dropout(config.attention_probs_dropout_prob)

    def forward(self, hidden: np.ndarray, mask: np.ndarray | None, rows: np.ndarray) -> np.ndarray:
        q, k, v = self.query(rows), self.key(hidden), self.value(hidden)
        dropout = self.dropout.p if self.training else 0.0
        return _core.attention(q, k, v, self.num_attention_heads, mask, None, dropout)


class BertOutput(Module):
    """A projection, added to the block's input and normalised."""

    def __init__(self, size: int, config: ModelConfig, dtype: Any) -> None:
        super().__init__()
        self.dense = Linear(size, config.hidden_size, dtype=dtype)
        self.LayerNorm = norm(config.hidden_size, config, dtype)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, x: np.ndarray, block_input: np.ndarray) -> np.ndarray:
        return self.LayerNorm(self.dropout(self.dense(x)), block_input)


class BertAttention(Module):
    """Self-attention and its projection."""

    def __init__(self, config: ModelConfig, dtype: Any) -> None:
        super().__init__()
        self.self = BertSelfAttention(config, dtype)
        self.output = BertOutput(config.hidden_size, config, dtype)

    def forward(self, hidden: np.ndarray, mask: np.ndarray | None, rows: np.ndarray) -> np.ndarray:
        return self.output(self.self(hidden, mask, rows), rows)


class BertIntermediate(Module):
    """The first half of the feed-forward block: projection and activation."""

    def __init__(self, config: ModelConfig, dtype: Any) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.intermediate_size, dtype=dtype)
        self.activation = _ACTIVATIONS[config.hidden_act]

    def forward(self, hidden: np.ndarray) -> np.ndarray:
        return self.dense.forward_act(hidden, self.activation)


class BertLayer(Module):
    """One transformer block."""

    def __init__(self, config: ModelConfig, dtype: Any) -> None:
        super().__init__()
        self.attention = BertAttention(config, dtype)
        self.intermediate = BertIntermediate(config, dtype)
        self.output = BertOutput(config.intermediate_size, config, dtype)

    def forward(self, hidden: np.ndarray, mask: np.ndarray | None, first_only: bool = False) -> np.ndarray:
        rows = hidden[:, :1] if first_only else hidden
        attended = self.attention(hidden, mask, rows)
        return self.output(self.intermediate(attended), attended)


class BertEncoder(Module):
    """The blocks, one after the other. With first_only the last one computes the first token alone."""

    def __init__(self, config: ModelConfig, dtype: Any) -> None:
        super().__init__()
        self.layer = ModuleList(BertLayer(config, dtype) for _ in range(config.num_hidden_layers))

    def forward(
        self, hidden: np.ndarray, mask: np.ndarray | None, keep: bool, first_only: bool = False
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        states = [hidden]
        last = len(self.layer) - 1
        for i, layer in enumerate(self.layer):
            hidden = layer(hidden, mask, first_only and i == last)
            if keep:
                states.append(hidden)
        return hidden, tuple(states) if keep else None


class BertPooler(Module):
    """tanh of a projection of the first token."""

    def __init__(self, config: ModelConfig, dtype: Any) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size, dtype=dtype)

    def forward(self, hidden: np.ndarray) -> np.ndarray:
        return self.dense.forward_act(hidden[:, 0], "tanh")


class BertModel(PreTrainedModel):
    """The encoder without a task.

    Args:
        config: a `ModelConfig`; fields that it lacks have BERT-base's values.
        add_pooling_layer: whether to have the pooler.
        dtype: what to store weights in.
    """

    base_model_prefix = "bert"
    defaults = _DEFAULTS

    def __init__(self, config: ModelConfig, add_pooling_layer: bool = True, dtype: Any = "float32") -> None:
        config = _checked(config)
        super().__init__(config)
        self.embeddings = BertEmbeddings(config, dtype)
        self.encoder = BertEncoder(config, dtype)
        self.pooler = BertPooler(config, dtype) if add_pooling_layer else None
        self._start_weights()

    def get_input_embeddings(self) -> Embedding:
        """The table of words."""
        return self.embeddings.word_embeddings

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        output_hidden_states: bool = False,
    ) -> ModelOutput:
        """Encode a batch.

        Args:
            input_ids: (batch, length) integers, 0 … vocab_size − 1; length ≤ max_position_embeddings.
            attention_mask: (batch, length), 0 where there is padding. None: no padding.
            token_type_ids: (batch, length) integers, the segment of each token. None: all 0.
            position_ids: (batch, length) or (1, length) integers. None: 0, 1, 2, ….
            inputs_embeds: (batch, length, hidden_size) word embeddings instead of input_ids.
            output_hidden_states: keep the input and the output of every block.

        Returns:
            last_hidden_state (batch, length, hidden_size); pooler_output (batch, hidden_size), None without a pooler;
            hidden_states, a tuple of num_hidden_layers + 1 arrays, or None.

        Raises:
            ValueError: a shape that does not fit, or a sequence that is too long.
            IndexError: an id outside its table.
            TypeError: ids that are not integers.
        """
        hidden, states = self._encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_hidden_states, False
        )
        return ModelOutput(last_hidden_state=hidden, pooler_output=self._pool(hidden), hidden_states=states)

    def _encode(
        self,
        input_ids: Any,
        attention_mask: Any,
        token_type_ids: Any,
        position_ids: Any,
        inputs_embeds: Any,
        keep: bool,
        first_only: bool,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """The last hidden states, of the first token alone if first_only, and all of them if keep."""
        words = self._words(input_ids, inputs_embeds)
        batch, length, _ = words.shape
        token_type_ids = _as_ids("token_type_ids", token_type_ids, batch, length)
        position_ids = _as_ids("position_ids", position_ids, batch, length)
        mask = _as_mask(attention_mask, batch, length)
        hidden = self.embeddings(words, token_type_ids, position_ids)
        encoded: tuple[np.ndarray, tuple[np.ndarray, ...] | None] = self.encoder(hidden, mask, keep, first_only)
        return encoded

    def _pool(self, hidden: np.ndarray) -> np.ndarray | None:
        return self.pooler(hidden) if self.pooler is not None and hidden.shape[1] > 0 else None

    def _words(self, input_ids: Any, inputs_embeds: Any) -> np.ndarray:
        """Word embeddings in memory of their own."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        if input_ids is not None:
            ids = np.asarray(input_ids)
            if ids.ndim != 2:
                raise ValueError(f"input_ids must have shape (batch, length), got {ids.shape}")
            self._check_length(ids.shape[1])
            return self.embeddings.word_embeddings(ids)
        words = inputs_embeds if isinstance(inputs_embeds, np.ndarray) else np.asarray(inputs_embeds)
        if words.ndim != 3 or words.shape[2] != self.config.hidden_size:
            raise ValueError(
                f"inputs_embeds must have shape (batch, length, {self.config.hidden_size}), got {words.shape}"
            )
        self._check_length(words.shape[1])
        return words.astype(np.float64 if words.dtype == np.float64 else np.float32)

    def _check_length(self, length: int) -> None:
        most = self.config.max_position_embeddings
        if length > most:
            raise ValueError(
                f"a sequence of {length} tokens is longer than the {most} that this model has positions for"
            )


class BertForSequenceClassification(PreTrainedModel):
    """BERT with a linear classifier on the pooled output.

    Args:
        config: a `ModelConfig`; `num_labels` is the number of classes.
        dtype: what to store weights in.
    """

    base_model_prefix = "bert"
    defaults = _DEFAULTS

    def __init__(self, config: ModelConfig, dtype: Any = "float32") -> None:
        config = _checked(config)
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, dtype=dtype)
        dropout = config.classifier_dropout
        self.dropout = Dropout(config.hidden_dropout_prob if dropout is None else dropout)
        self.classifier = Linear(config.hidden_size, config.num_labels, dtype=dtype)
        self._start_weights()

    def get_input_embeddings(self) -> Embedding:
        """The table of words."""
        return self.bert.get_input_embeddings()

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        output_hidden_states: bool = False,
    ) -> ModelOutput:
        """Classify a batch; arguments and errors are those of `BertModel.forward`.

        Returns:
            logits (batch, num_labels); hidden_states as `BertModel` gives them, or None.
        """
        # Only the first token is looked at: the last block need not compute the others, neither forward nor back.
        hidden, states = self.bert._encode(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_hidden_states,
            not output_hidden_states,
        )
        pooled = self.bert._pool(hidden)
        if pooled is None:
            raise ValueError("a sequence without tokens cannot be classified")
        logits = self.classifier(self.dropout(pooled))
        return ModelOutput(logits=logits, hidden_states=states)


def _checked(config: ModelConfig) -> ModelConfig:
    """The config with defaults, if a BERT can be made of it."""
    config = config.with_defaults(_DEFAULTS)
    if config.hidden_act not in _ACTIVATIONS:
        raise ValueError(f"hidden_act {config.hidden_act!r} is not known; known are {', '.join(_ACTIVATIONS)}")
    if config.position_embedding_type not in (None, "absolute"):
        raise NotImplementedError(
            f"position_embedding_type {config.position_embedding_type!r}: only absolute positions"
        )
    if config.is_decoder:
        raise NotImplementedError("is_decoder: only the encoder is implemented")
    for name in ("hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings", "vocab_size"):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {config.num_attention_heads}"
        )
    return config


def _as_ids(name: str, ids: Any, batch: int, length: int) -> np.ndarray | None:
    if ids is None:
        return None
    ids = np.asarray(ids)
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2 or ids.shape[0] not in (1, batch) or ids.shape[1] != length:
        raise ValueError(f"{name} must have shape (batch, length) = ({batch}, {length}), got {ids.shape}")
    return ids


def _as_mask(mask: Any, batch: int, length: int) -> np.ndarray | None:
    """Which keys count, as bool; None when all do."""
    if mask is None:
        return None
    mask = np.asarray(mask)
    if mask.shape != (batch, length):
        raise ValueError(f"attention_mask must have shape (batch, length) = ({batch}, {length}), got {mask.shape}")
    mask = mask != 0
    return None if mask.all() else mask
