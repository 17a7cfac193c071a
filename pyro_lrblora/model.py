"""Network, adapter, prior and likelihood as one Pyro model."""

from __future__ import annotations

import copy
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from . import likelihoods, priors
from .adapters import LoRAXS
from .adapters.attach import Attachment
from .adapters.rows import check_one_draw, run_rows
from .adapters.targets import check_rank, device_of, find_targets
from .context import check_context
from .data import Batch, batch_rows, check_class_order
from .data.batches import IGNORED
from .data_plate import DataPlate
from .head import FixedHead, PointHead, check_head, check_in_memory, head_parameters, head_prior, output_layer
from .parts import check_network, check_padding, check_parts, output_embedding
from .positions import positions, takes_positions
from .priors.learned import LearnedScale

# What the network is autocast to, by name; guide and loss are float32 always.
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class BayesianLoRA:
    """A Pyro model of fine-tuning: the prior samples the latents, the network turns them into labels.

    `model(batch)` works with SVI, Predictive, NUTS, poutine and stock autoguides; the latents are outside the data
    plate. `model.rowwise(batch)` has a draw per row, inside the plate, for guides that declare it. `model()` samples
    the prior alone. The network is only borrowed: nothing of it is changed by anything here.

    Args:
        network: a transformers model, or any module called with the batch's tensors by name.
        adapter: LoRAXS(...) or LoRA(...); None is LoRAXS().
        prior: a Pyro program over the latents, see pyro_lrblora.priors.
        likelihood: a Pyro program that observes batch["labels"], see pyro_lrblora.likelihoods.
        head: "point" (trained, no posterior), "bayesian" (a sample site per parameter), a FixedHead such as
            fixed_from(posterior), or "frozen" (the network's own values).
        head_modules: dotted names of the head's modules; None takes what stands outside a transformers model's base.
        head_scale: standard deviation of the Normal prior on head weights, whether sampled, trained to a point, or
            fitted as the linear probe; None lets `prepare` choose it by cross-validation of the probe. Around what the
            parameters are, and how wide the output's bias is: pyro_lrblora.head.head_prior.
        tokenizer: used for every datasets.Dataset given to this model or its posteriors.
        size: N, the number of training rows; `prepare` and `fit` find it themselves.
        dropout: run the network in training mode while fitting.

    Raises:
        ValueError: no target matched, a rank that does not fit, a head that is none of the above, a network that peft
            has changed or torch has compiled, one that means another token by padding than the tokenizer, a language
            model with class labels.
        TypeError: an adapter, prior or likelihood that is a class or cannot be called.

    Warns:
        UserWarning: labels are classes, and the network has no head to train.
    """

    def __init__(
        self,
        network: nn.Module,
        adapter=None,
        prior: Callable = priors.Normal(0.1),
        likelihood: Callable = likelihoods.Categorical(),
        *,
        head: str | FixedHead = "point",
        head_modules: Sequence[str] | None = None,
        head_scale: float | None = None,
        tokenizer=None,
        size: int | None = None,
        dropout: bool = False,
    ):
        self.network, self.adapter = network, LoRAXS() if adapter is None else adapter
        check_parts(self.adapter, prior, likelihood)
        check_network(network, likelihood)
        check_padding(network, tokenizer)
        self.prior, self.likelihood = prior, likelihood
        self.tokenizer, self.size, self.dropout = tokenizer, size, dropout
        self.head_modules, self.head_scale = head_modules, head_scale
        parameters = head_parameters(network, head_modules)
        check_in_memory(parameters)
        output = output_embedding(network)
        excluded = {name.rpartition(".")[0] for name in parameters}
        excluded |= {name for name, module in network.named_modules() if module is output}
        self.modules = find_targets(network, self.adapter.targets, self.adapter.layers, excluded)
        check_rank(self.adapter, self.modules)
        self._takes_positions = takes_positions(network)
        if not parameters and output is None and head in ("point", "bayesian") and hasattr(likelihood, "logits"):
            warnings.warn(
                f"no head was found in {type(network).__name__}: nothing is trained but the adapter; name its modules, "
                "head_modules=[...], or write head='frozen'",
                stacklevel=2,
            )
        self.prepared = False  # whether `prepare` has seen the training data
        self._adapted, self._unprepared = None, None  # its subspace; until `prepare`, one that needs no data
        self._mixing = None  # what mixing_modules found
        self._head_scale_given = head_scale is not None
        self._learned_scale: LearnedScale | None = None
        self._attachment: Attachment | None = None
        self._precision = "fp32"
        self._class_names: Sequence[str] | None = None
        self._set_head(head, {name: p.detach().float().clone() for name, p in parameters.items()})

    def __repr__(self) -> str:
        return (
            f"BayesianLoRA({type(self.network).__name__}, {self.adapter}, {self.prior}, {self.likelihood}, "
            f"head={self.head!r}, size={self.size})"
        )

    @property
    def device(self) -> torch.device:
        """Where the latents live and batches are sent, the device of the first adapted module."""
        return device_of(next(iter(self.modules.values())))

    @property
    def adapted(self):
        """The adapter bound to this network; computed at first use where its projection needs no data."""
        if self._adapted is not None:
            return self._adapted
        if self.adapter.statistics is not None:
            raise ValueError(
                f"expected a prepared model: {self.adapter} looks at data; write model = model.prepare(train)"
            )
        if self._unprepared is None:
            self._unprepared = self.adapter.bind(self.modules, {}, torch.Generator().manual_seed(0))
        return self._unprepared

    @property
    def sites(self):
        """The latent sites, a LatentSites with names, shapes and D."""
        return self.adapted.sites

    @property
    def learned_scale(self) -> LearnedScale | None:
        """The trained scale of a Learned prior, at its start in every copy; else None."""
        if self._learned_scale is None and isinstance(self.prior, priors.Learned):
            self._learned_scale = LearnedScale(self.prior, self.sites.shapes, self.device)
        return self._learned_scale

    @property
    def classes(self) -> int | None:
        """C, from the head's output layer or the network's config."""
        if self._output_layer is not None:
            return self.network.get_submodule(self._output_layer).out_features
        return getattr(getattr(self.network, "config", None), "num_labels", None)

    @property
    def class_names(self) -> list[str] | None:
        """The classes' names, from the likelihood, the data or the network's config."""
        names = getattr(self.likelihood, "class_names", None)
        if names is None and self._class_names is not None and self.classes in (None, len(self._class_names)):
            names = self._class_names  # a data set keeps the names of classes whose rows were dropped
        if names is None and self.classes is not None:
            labels = getattr(getattr(self.network, "config", None), "id2label", None) or {}
            names = [str(labels.get(i, i)) for i in range(self.classes)]
        return list(names) if names else None

    def start(self) -> dict[str, Tensor]:
        """Latents (and a Bayesian head) at which the network is the pretrained one with its probed head."""
        values = self.adapted.start() | (self.head_start if self.head == "bayesian" else {})
        # Copies: a guide's parameters may start as these very tensors.
        return {name: value.to(self.device, copy=True) for name, value in values.items()}

    # --- the Pyro model

    def __call__(self, batch: Batch | None = None, per_row: bool = False):
        if batch is None:
            return self.sample_prior()
        batch = self.to_device(batch)
        head = self.head_values()
        plate = self.data_plate(batch)
        with plate.latents() if per_row else nullcontext():
            values = self.sample_prior()
        if not per_row:
            check_one_draw(values, self.sites.shapes)
        outputs = self.outputs(batch, values, head)
        with plate:
            self.likelihood(outputs, batch)
        return outputs

    def rowwise(self, batch: Batch):
        """The model with its latents inside the data plate, one draw per row, their log density scaled by 1/N.

        Plain Trace_ELBO stays unbiased, since the sum over rows of (1/N) KL is KL. Only for guides whose own `rowwise`
        samples the latents in the same way; any other guide would silently be N local ones.
        """
        return self(batch, per_row=True)

    def sample_prior(self) -> dict[str, Tensor]:
        """Sample the latents, and a Bayesian head, from the prior: sites by name, drawn on the model's device."""
        shapes = self.sites.shapes
        with nullcontext() if self.device.type == "cpu" else torch.device(self.device):
            values = self.prior(shapes) if self.learned_scale is None else self.prior(shapes, self.learned_scale())
            if not isinstance(values, Mapping):
                raise TypeError(f"expected the prior to return a dict of the latent sites, got {type(values).__name__}")
            missing = [name for name in shapes if name not in values]
            if missing:
                raise KeyError(f"expected the prior to return every latent site {list(shapes)}, missing {missing}")
            if self.head == "bayesian":
                values = dict(values) | {
                    name: pyro.sample(name, prior.to_event()) for name, prior in self.head_prior().items()
                }
        return values

    def head_values(self) -> dict[str, Tensor]:
        """The parameters of a point, fixed or frozen head by dotted name; empty where the head is Bayesian."""
        return self._fixed_head if self.point_head is None else self.point_head()

    def head_penalty(self, head: Mapping[str, Tensor]) -> Tensor | float:
        """Minus the log prior of a point head, in nats up to a constant."""
        if self.point_head is None:
            return 0.0
        prior = self.head_prior()
        return sum(0.5 * ((w - prior[name].loc) / prior[name].scale).square().sum() for name, w in head.items())

    def head_prior(self) -> dict[str, dist.Normal]:
        """The prior of the head's parameters by dotted name, a point's and a Bayesian one's alike."""
        centre = {name: value.to(self.device) for name, value in self.head_centre.items()}
        return head_prior(centre, self._output_layer, self.head_scale or 1.0)

    def outputs(self, batch: Batch, values: Mapping[str, Tensor], head: Mapping[str, Tensor]):
        """What the network returns for a batch at given latents, one draw or one per row.

        Args:
            batch: tensors by name on the model's device; "labels" is not passed on.
            values: sites by name, the parameters of a Bayesian head among them.
            head: what head_values returned.
        """
        # A Bayesian head is among the values, and so is the head of an ensemble's member.
        head = {**head, **{name: values[name] for name in self.head_start if name in values}}
        with self.attached() if self._attachment is None else nullcontext():
            return run_rows(self, batch, {name: values[name] for name in self.sites.shapes}, head)

    def pretrained_outputs(self, batch: Batch, head: Mapping[str, Tensor]):
        """What the network returns without the adapter."""
        with Attachment(self.network, None) as attachment:
            attachment.set({}, head)
            return self._run(self.to_device(batch))

    def pretrained_labels(self, batch: Batch) -> tuple[dist.TorchDistribution, Tensor | None]:
        """The distribution of a batch's labels without the adapter, at the head's start, and the labels seen."""
        batch = self.to_device(batch)
        head = self.head_start if self.head in ("point", "bayesian") else self._fixed_head
        outputs = self.pretrained_outputs(batch, head)
        return likelihoods.label_site(self.likelihood, outputs, batch)

    @contextmanager
    def attached(self, precision: str = "fp32", dropout: bool | None = None):
        """A `with` block in which the network carries the adapter, from forward through backward.

        Needed by hand only where gradient checkpointing runs the layers again in backward, or for a precision.

        Args:
            precision: "fp32", or "bf16" or "fp16" for autocast in the network alone.
            dropout: None takes the model's own setting.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"expected precision to be one of {list(PRECISIONS)}, got {precision!r}")
        with Attachment(self.network, self.adapted, self.dropout if dropout is None else dropout) as attachment:
            self._attachment, self._precision = attachment, precision
            try:
                yield
            finally:
                self._attachment, self._precision = None, "fp32"

    @contextmanager
    def carrying(self, values: Mapping[str, Tensor], head: Mapping[str, Tensor], precision: str = "fp32"):
        """A `with` block in which the bare network computes with given latents, as in `outputs`."""
        with self.attached(precision, dropout=False):
            self._attachment.set({name: values[name] for name in self.sites.shapes}, head)
            with self._autocast():
                yield

    def data_plate(self, batch: Batch) -> DataPlate:
        """The plate over a batch of B rows out of N."""
        rows = batch_rows(batch)
        if self.size is None and batch.get("labels") is not None:
            raise ValueError(
                "expected to know the number of training rows N, which a batch cannot tell; write "
                "model.prepare(train) or BayesianLoRA(..., size=N)"
            )
        return DataPlate(self.size or rows, rows, {*self.sites.shapes, "_latents"})

    def label_distribution(self, outputs, batch: Batch) -> dist.TorchDistribution:
        """The distribution the likelihood gives the labels, batch shape (B,)."""
        return likelihoods.label_site(self.likelihood, outputs, batch)[0]

    def log_likelihood(self, outputs, batch: Batch) -> Tensor:
        """Log probability of each row's labels, nats, (B,)."""
        labels, observed = likelihoods.label_site(self.likelihood, outputs, batch)
        return labels.log_prob(observed)

    @property
    def predicts_classes(self) -> bool:
        """Whether a prediction is known to be probabilities of classes (or choices)."""
        own = not hasattr(self.likelihood, "prediction") and self.classes is not None
        return hasattr(self.likelihood, "logits") or own

    def to_device(self, batch: Batch) -> dict[str, Tensor]:
        """The batch's tensors on the model's device."""
        return {name: v.to(self.device) for name, v in batch.items() if isinstance(v, Tensor)}

    # --- copies with one thing changed

    def with_prior(self, prior: Callable) -> BayesianLoRA:
        """The same subspace and head start under another prior."""
        check_parts(self.adapter, prior, self.likelihood)
        return self._copy(prior=prior).with_head(self.head)

    def with_head(self, head: str | FixedHead) -> BayesianLoRA:
        """The same subspace and prior with another treatment of the head; a point head starts anew."""
        new = self._copy()
        new._set_head(head, self.head_start, self.head_centre)
        return new

    def with_size(self, size: int) -> BayesianLoRA:
        """The same model for another number of training rows; a point head starts anew."""
        return self._copy(size=size).with_head(self.head)

    def in_subspace_of(self, other: BayesianLoRA, head_start: Mapping[str, Tensor] | None = None) -> BayesianLoRA:
        """The same prior and likelihood in another model's subspace, its head there or (None) left for `prepare`.

        Raises:
            ValueError: another adapter, or modules of other names or shapes.
        """
        from .infer.start import check_same_modules

        check_same_modules(self, other, "another model")
        new = self._copy(_adapted=other.adapted)
        if head_start is not None:
            new.head_scale = self.head_scale or other.head_scale
            new.prepared, new._class_names = other.prepared, other._class_names
            # What a fit made of the head is a start, not what is believed before the data.
            new._set_head(self.head, head_start, self.head_centre if self.prepared else other.head_centre)
        return new

    def prepare(
        self, train, *, tokenizer=None, probe: bool = True, batch_size: int = 32, seed: int = 0, cache=None
    ) -> BayesianLoRA:
        """A copy that knows N, the probed head and the subspace; see pyro_lrblora.preparation.prepare."""
        from .preparation import prepare

        return prepare(self, train, tokenizer=tokenizer, probe=probe, batch_size=batch_size, seed=seed, cache=cache)

    def check_labels(self, batches, role: str) -> None:
        """Raise a ValueError unless the likelihood can take the batches' labels, and the network the longest row."""
        if batches.labels is None:
            raise ValueError(
                f"expected a column 'label' or 'labels' in the {role}, got none; for a language model write "
                "lb.data.Texts(dataset, tokenizer)"
            )
        check_class_order(self._class_names, batches.class_names, role)
        check_context(self.network, batches.longest, role)
        if hasattr(self.likelihood, "check_labels"):
            labels = batches.labels
            if batches.for_decoder and labels.dim() == 2:
                # In the place of the start token that a decoder reads first: aligned as any text's are.
                labels = nn.functional.pad(labels, (1, 0), value=IGNORED)
            self.likelihood.check_labels(labels, self.classes)

    def induced_sd(self, draws: int = 200, seed: int = 0) -> dict[str, float]:
        """Prior standard deviation of the entries of W - W0 per module; see pyro_lrblora.prior_predictive."""
        from .prior_predictive import induced_sd

        return induced_sd(self, draws, seed)

    def prior_predictive(self, data, draws: int = 100, seed: int = 0, **options):
        """A Prediction with draws from the prior, labels not needed; see pyro_lrblora.prior_predictive."""
        from .prior_predictive import prior_predictive

        return prior_predictive(self, data, draws, seed, **options)

    def _copy(self, **changes) -> BayesianLoRA:
        new = copy.copy(self)
        new.__dict__.update(changes)
        new._learned_scale = None  # a copy learns the scale anew
        new._attachment, new._precision = None, "fp32"  # and what is attached is the model it was made of
        return new

    def _set_head(
        self, head: str | FixedHead, start: Mapping[str, Tensor], centre: Mapping[str, Tensor] | None = None
    ) -> None:
        """Begin with a head, its prior around `centre`, or, where that is None, around the start."""
        check_head(head, start)
        self.head, self.head_start = head, {name: value.to(self.device) for name, value in start.items()}
        centre = centre or start
        self.head_centre = {name: centre[name].to(self.device) for name in start}
        self._fixed_head = {}
        if isinstance(head, FixedHead):
            self._fixed_head = {name: value.to(self.device) for name, value in head.values.items()}
        elif head == "frozen":
            self._fixed_head = {name: self.network.get_parameter(name).detach() for name in start}
        self._output_layer = output_layer(self.network, self.head_start)
        # A name of its own, so that two heads never meet in Pyro's param store.
        name = f"head_{uuid.uuid4().hex[:8]}"
        self.point_head = PointHead(self.head_start, name) if head == "point" and start else None

    def _run(self, batch: Batch):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if self._takes_positions:
            inputs |= positions(inputs)
        with self._autocast():
            return self.network(**inputs)

    def _autocast(self):
        dtype = PRECISIONS[self._precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)
