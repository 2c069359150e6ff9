"""The schema of a run file: one frozen section per concern, a description per key.

Types, ranges and defaults are defined only here. Checks across keys (heads that do not divide, a warm-up longer than
the decay) are in `configs.rules`.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from configs.backends import BACKENDS
from configs.choices import FAMILIES, OPTIMIZERS, OneOf
from configs.path_text import PathText, StoreText
from configs.positions import ALIBI_BIAS_MAX, POSITIONS
from configs.precisions import PRECISIONS
from configs.schedules import SCHEDULES
from configs.section import (
    COUNTABLE,
    PUBLIC_LINES,
    PUBLIC_URI,
    PUBLIC_VARIABLES,
    TUPLE,
    Fraction,
    NonNegativeInt,
    PositiveInt,
    Section,
    SequenceLength,
    StepStages,
    TextOrNumber,
    text_of_number,
)


def _source_of_path(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class Run(Section):
    """What the run is called and where it lives."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$", description="Name, also in MLflow and SLURM.")
    seed: Annotated[int, Field(ge=0)] = Field(default=1, description="Seed of weights, sample order and dropout.")
    dir: PathText = Field(description="The run folder; relative to where the command is started.")


class Model(Section):
    """The decoder's shape."""

    # the parameters of each layer are listed, and the deepest published model has 1,000 layers
    layers: Annotated[int, Field(ge=1, le=2_000)] = Field(description="Transformer blocks.")
    hidden: PositiveInt = Field(description="Width of the residual stream.")
    heads: PositiveInt = Field(description="Attention heads, over all tensor ranks.")
    feed_forward: PositiveInt | None = Field(
        default=None, description="Width of the feed-forward; 4 x hidden unless set, 8/3 x hidden with a gate (jais)."
    )
    position: Annotated[str, OneOf(POSITIONS)] = Field(default="alibi", description="How order enters the model.")
    family: Annotated[str, OneOf(FAMILIES)] = Field(
        default="bloom", description="Block design: GELU and biases (bloom), GELU (mpt), or SwiGLU and biases (jais)."
    )
    attention: Annotated[str, OneOf(BACKENDS, also=("auto",))] = Field(
        default="auto", description="Attention backend; auto is flex on a GPU where it can, else sdpa."
    )
    windows: Literal["auto", "scores", "off"] = Field(
        default="auto",
        description="In training, leave out keys to which ALiBi gives no weight (auto), or compute them (off). scores "
        "leaves out more on a GPU in bf16, by looking at the scores in a kernel whose speed none has shown yet.",
    )
    window: PositiveInt | None = Field(
        default=None,
        description="Tokens that a query sees, itself included, with any position method; all before it unless set. "
        "A window of sequence_length or more changes nothing in training, only at longer lengths.",
    )
    init_std: Annotated[float, Field(gt=0.0)] = Field(
        default=0.02,
        description="Std of the initial weights; of the two matrices of a block that add to the residual stream, "
        "init_std / sqrt(2 x layers).",
    )
    embedding_init_std: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None,
        description="Std of the initial word embedding. Unless set: init_std, or less where the first loss would be "
        "well above ln(vocab_size), as the head shares the embedding.",
    )
    tie_embeddings: bool = Field(
        default=True, description="Whether the head shares the word embedding's weight, or has one of its own (false)."
    )
    alibi_bias_max: Annotated[int, Field(ge=1, le=64)] = Field(
        default=ALIBI_BIAS_MAX,
        description="The flattest slope of ALiBi is 2^-alibi_bias_max, for a power of two of heads; BLOOM's is 8.",
    )
    dropout: Fraction = Field(
        default=0.0, description="Dropout on embedding, attention output and feed-forward output."
    )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads

    @property
    def inner(self) -> int:
        """Width of the feed-forward."""
        return self.feed_forward or FAMILIES[self.family].default_inner(self.hidden)

    def window_hides(self, length: int) -> bool:
        """Return whether the sliding window hides keys of a sequence of this many tokens."""
        return self.window is not None and self.window < length


class Source(Section):
    """One source of text; a run file may give just its path."""

    path: PathText = Field(description="A file, a glob, a prepared .bin, or `python-docs`.")
    weight: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None,
        description="Share of the samples, relative to the other weights; in proportion to its size unless set.",
    )


class Data(Section):
    """Text, tokenizer and samples."""

    sources: Annotated[tuple[Annotated[Source, BeforeValidator(_source_of_path)], ...], TUPLE] = Field(
        min_length=1,
        description="Files, globs, prepared .bin, `python-docs` (text of the installed Python), or {path, weight} "
        "for a blend.",
    )
    dir: PathText | None = Field(default=None, description="Folder of prepared data; RUN_DIR/data unless set.")
    tokenizer: PathText | None = Field(
        default=None,
        description="An existing sentencepiece .model or tokenizer.json, or a folder that holds one; one is trained "
        "unless set.",
    )
    vocab_size: Annotated[int, Field(ge=300), COUNTABLE] = Field(
        description="Tokens of the tokenizer; of a given one it may be more: rows without a token."
    )
    sequence_length: SequenceLength = Field(description="Training length in tokens.")
    split: Fraction = Field(
        default=0.02,
        description="Share of the text held out for validation, in documents or parts of long ones; 0 for none.",
    )
    document_separator: str | None = Field(
        default=None,
        min_length=1,
        description="Cuts a text file into documents; a newline in it also matches CRLF. One document unless set.",
    )
    mask_documents: bool = Field(
        default=False, description="Keep attention inside each document; positions begin again in each."
    )


class Parallel(Section):
    """How the model is split; the remaining ranks are data parallel."""

    tensor: PositiveInt = Field(default=1, description="Ranks that share each layer's heads and columns.")
    pipeline: PositiveInt = Field(default=1, description="Stages that share the layers.")
    sequence: bool = Field(default=False, description="Split norms and dropout along the sequence over tensor ranks.")
    zero: Annotated[int, Field(ge=0, le=3)] = Field(default=1, description="DeepSpeed ZeRO stage.")
    offload: Literal["none", "cpu"] = Field(default="none", description="Where ZeRO keeps the optimizer state.")
    overlap: bool = Field(default=False, description="Average gradients while others are computed (bf16, ZeRO 1).")


class Train(Section):
    """Optimization."""

    micro_batch: PositiveInt = Field(description="Sequences of one forward pass on one data rank.")
    global_batch: PositiveInt = Field(description="Sequences of one optimizer step, over all data ranks.")
    batch_warmup: StepStages = Field(
        default=(),
        description="Smaller batches before train.global_batch, each with its steps: [[256, 1000], [512, 500]] for 256 "
        "sequences in each of the first 1,000 steps and 512 in each of the next 500.",
    )
    length_warmup: StepStages = Field(
        default=(),
        description="Shorter lengths before data.sequence_length, each with its steps: [[256, 1000]] cuts the "
        "sequences of the first 1,000 steps into pieces of 256 tokens.",
    )
    steps: PositiveInt = Field(description="Optimizer steps of the whole run; of a branch, with those before it.")
    schedule: Annotated[str, OneOf(SCHEDULES)] = Field(
        default="cosine",
        description="How the learning rate falls after the warm-up: along a cosine, a line, never, or along a line in "
        "the last steps (warm-up, stable, decay).",
    )
    decay_steps: PositiveInt | None = Field(
        default=None, description="Step at which the fall of the learning rate ends; train.steps at the first start."
    )
    cooldown_steps: PositiveInt | None = Field(
        default=None, description="Steps of the fall with schedule wsd; a fifth of decay_steps unless set."
    )
    warmup_steps: NonNegativeInt = Field(default=0, description="Steps of linear warm-up.")
    learning_rate: Annotated[float, Field(gt=0.0)] = Field(description="Peak learning rate.")
    min_learning_rate: Annotated[float, Field(ge=0.0)] = Field(default=0.0, description="Learning rate after the fall.")
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(
        default=0.1,
        description="Decay of matrices and the embedding; norms, biases and learned positions do not decay.",
    )
    momentum: Fraction = Field(default=0.95, description="Muon's momentum of matrices.")
    beta1: Fraction = Field(default=0.9, description="AdamW beta 1.")
    beta2: Fraction = Field(default=0.95, description="AdamW beta 2.")
    epsilon: Annotated[float, Field(gt=0.0)] = Field(default=1e-8, description="AdamW epsilon.")
    clip: Annotated[float, Field(gt=0.0)] = Field(default=1.0, description="Largest global gradient norm.")
    z_loss: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0,
        description="Weight of the z-loss, the square of log(sum of exp(logits)), which keeps logits from drifting: "
        "1e-4 in PaLM. Losses are shown without it.",
    )
    precision: Annotated[str, OneOf(PRECISIONS)] = Field(
        default="fp32", description="Type of the forward and backward pass; tf32 is fp32 that a GPU multiplies faster."
    )
    optimizer: Annotated[str, OneOf(OPTIMIZERS)] = Field(
        default="adamw", description="Optimizer. muon is Muon for the matrices of blocks, and AdamW for the rest."
    )
    compile: Literal["auto", "on", "triton", "off"] = Field(
        default="auto",
        description="Fuse what lies between the matrix products: `on` compiles it with torch.compile, auto does so on "
        "a GPU; `triton` takes kernels written for it, which need a GPU.",
    )
    recompute: Annotated[Literal[False, True, "selective"], BeforeValidator(text_of_number)] = Field(
        default=False,
        description="Recompute in the backward pass: true whole blocks, `selective` what lies between the matrix "
        "products, and attention only where it keeps all scores, or a strip of bias in each layer. Less memory, more "
        "time.",
    )
    deterministic: bool = Field(
        default=False,
        description="Use only algorithms that repeat bit for bit, at some cost in speed; the start says what may not.",
    )
    init_from: PathText | None = Field(default=None, description="A checkpoint whose weights start this run.")
    branch_from: PathText | None = Field(
        default=None,
        description="A checkpoint that this run continues: weights, optimizer state, step and place in the data.",
    )
    spike: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None,
        description="Rise of the loss that counts as divergence, in nats: 10 losses in a row that lie so far above the "
        "mean of up to 100 before. Only a loss or gradient norm that is not finite counts unless set.",
    )
    rollbacks: NonNegativeInt = Field(
        default=0,
        description="How often training may go back to a checkpoint when it diverges, and leave out the samples since "
        "then; after that it stops.",
    )
    log_every: PositiveInt | None = Field(
        default=None, description="Steps between two lines of the log; about one line every 10 s unless set."
    )


class CheckpointRules(Section):
    """When the state is saved."""

    every: PositiveInt = Field(default=1000, description="Steps between checkpoints.")
    keep: PositiveInt = Field(default=3, description="Newest checkpoints to keep.")
    keep_every: NonNegativeInt = Field(
        default=0, description="Steps between checkpoints that stay for good; 0 for none."
    )
    keep_best: NonNegativeInt = Field(default=0, description="Checkpoints of the lowest validation loss to keep.")
    background: bool = Field(
        default=False,
        description="Write checkpoints while training goes on: it waits only until they are copied into the machine's "
        "memory, which must hold them.",
    )
    export_every: NonNegativeInt = Field(
        default=0,
        description="Steps between exports during training, to RUN_DIR/exports; 0 for none. The last step is exported "
        "too.",
    )
    export_format: str = Field(default="hf", description="Format of those exports, as in `export --format`.")


class Evaluate(Section):
    """Perplexity, during training and after it."""

    lengths: Annotated[tuple[SequenceLength, ...], TUPLE] | None = Field(
        default=None, description="Lengths of `evaluate`; 1x, 2x, 4x and 8x the training length unless set."
    )
    protocols: Annotated[tuple[str, ...], TUPLE] = Field(
        default=("nonoverlapping",), min_length=1, description="nonoverlapping, sliding:STRIDE or last:TOKENS."
    )
    tensor: PositiveInt = Field(
        default=1, description="Ranks that share each layer in `evaluate`, for a model that does not fit on one GPU."
    )
    pipeline: PositiveInt = Field(
        default=1, description="Stages that share the layers in `evaluate`; it runs on tensor x pipeline ranks."
    )
    every: NonNegativeInt = Field(default=0, description="Steps between validations during training; 0 for none.")
    samples: PositiveInt = Field(
        default=64,
        description="Held-out sequences of a validation, of its longest length; all if there are fewer.",
    )
    validation_lengths: Annotated[tuple[SequenceLength, ...], TUPLE] = Field(
        default=(),
        description="Further lengths of each validation, on the same text as the training length: [2048, 4096] shows "
        "during training how a model of 1,024 tokens extrapolates.",
    )
    by_source: bool = Field(
        default=False, description="Whether validations also tell the loss of each of data.sources; they need weights."
    )


class Track(Section):
    """MLflow."""

    uri: Annotated[StoreText, PUBLIC_URI] | None = Field(
        default=None,
        repr=False,
        description="MLflow tracking URI; that of MLFLOW_TRACKING_URI, else a sqlite file beside the run folder unless "
        "set. A password in it stays out of every file; ${NAME} stands for an environment variable.",
    )
    experiment: str | None = Field(
        default=None,
        min_length=1,
        description="MLflow experiment; that of MLFLOW_EXPERIMENT_NAME, else `trainshort` unless set.",
    )
    tags: dict[str, TextOrNumber] = Field(default_factory=dict, description="Further tags of the run in MLflow.")
    offline: bool = Field(
        default=False,
        description="Record for MLflow in the run folder only and never connect, as on nodes without a network; "
        "`trainshort track sync` sends it.",
    )
    hook: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="Shell command at each event: started, saved, rolled_back, and how training ended."
    )


class Slurm(Section):
    """What `trainshort slurm` writes into its sbatch scripts."""

    partition: str | None = Field(default=None, description="Partition; the cluster's default unless set.")
    account: str | None = Field(default=None, description="Account to charge.")
    qos: str | None = Field(default=None, description="Quality of service.")
    time: TextOrNumber = Field(
        default="24:00:00", description='Time limit, quoted: "hours:minutes:seconds" or "days-hours:minutes:seconds".'
    )
    signal_seconds: Annotated[int, Field(ge=1, le=65535)] = Field(  # SLURM has no more
        default=120, description="Seconds before the time limit at which the ranks save and the job queues again."
    )
    gpus_per_node: NonNegativeInt = Field(default=8, description="GPUs of a node; 0 for CPU ranks.")
    ranks_per_node: PositiveInt | None = Field(
        default=None,
        description="Ranks of a node; unless set gpus_per_node, or on CPUs as few as hold whole copies of the model.",
    )
    cpus_per_rank: PositiveInt | None = Field(
        default=None, description="CPUs of a rank; the cluster's default unless set."
    )
    memory: TextOrNumber | None = Field(
        default=None, description="Memory of a node, as in `500G`; the cluster's default unless set."
    )
    constraint: str | None = Field(default=None, description="Node features to ask for.")
    starter: Literal["srun", "torchrun"] = Field(
        default="srun", description="One srun task a rank, or one torchrun a node."
    )
    container: PathText | None = Field(default=None, description="Image that the ranks run in; it holds trainshort.")
    container_kind: Literal["pyxis", "apptainer"] = Field(
        default="pyxis", description="What runs the image: enroot by srun's pyxis plugin, or apptainer."
    )
    mounts: Annotated[tuple[PathText, ...], TUPLE] = Field(
        default=(), description="Folders that the container sees, in addition to those of the run."
    )
    modules: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], TUPLE] = Field(
        default=(), description="Environment modules to load, in this order."
    )
    env: Annotated[dict[str, TextOrNumber], PUBLIC_VARIABLES] = Field(
        default_factory=dict,
        repr=False,
        description="Environment variables of the ranks, as they are written: a $ is not replaced, for which there is "
        "`slurm.setup`. The values of secrets, such as HF_TOKEN, stay out of every file: the jobs get them from the "
        "environment of the submission.",
    )
    setup: Annotated[tuple[str, ...], TUPLE, PUBLIC_LINES] = Field(
        default=(), repr=False, description="Lines of shell before the ranks start, verbatim; no secrets."
    )
    extra: Annotated[tuple[str, ...], TUPLE, PUBLIC_LINES] = Field(
        default=(), repr=False, description="Further #SBATCH options, verbatim; no secrets."
    )


class RunConfig(Section):
    """One whole run."""

    run: Run
    model: Model
    data: Data
    parallel: Parallel = Field(default_factory=Parallel)
    train: Train
    checkpoint: CheckpointRules = Field(default_factory=CheckpointRules)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    track: Track = Field(default_factory=Track)
    slurm: Slurm = Field(default_factory=Slurm)

    @property
    def evaluation_lengths(self) -> tuple[int, ...]:
        """Lengths that `evaluate` measures by default."""
        return self.evaluate.lengths or tuple(n * self.data.sequence_length for n in (1, 2, 4, 8))

    @property
    def validation_lengths(self) -> tuple[int, ...]:
        """Lengths of a validation in ascending order, the training length among them; none if the run has none."""
        lengths = {self.data.sequence_length, *self.evaluate.validation_lengths}
        return tuple(sorted(lengths)) if self.evaluate.every else ()
