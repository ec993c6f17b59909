"""Settings with their units, and what follows from them alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """What a checkpoint must know to build its model again."""

    vision: str = "demo"
    """vision tower: timm:NAME, hf:PATH, open_clip:ARCH@TAG, py:package.module:function, demo; ?layers=6&pool=mean"""
    text: str = "demo"
    """text tower: hf:NAME_OR_PATH, open_clip:ARCH@TAG, py:package.module:function, demo"""
    policy: str = "layernorm"
    """what is trained in both towers: layernorm, lora(r=8), adapter(reduction=4)+layernorm, … (see lilt policies)"""
    vision_policy: str | None = None
    """what is trained in the vision tower, where it differs"""
    text_policy: str | None = None
    """what is trained in the text tower, where it differs"""
    vision_roles: dict[str, str] | None = None
    """what is what in the vision tower, where the guess by type is wrong: {"layer*": "block", "**.rms": "norm"}"""
    text_roles: dict[str, str] | None = None
    """what is what in the text tower, where the guess by type is wrong; also ?roles=FILE.json in the spec"""
    projection: str = "linear(dim=256)"
    """head of both towers into the joint space: linear(dim=256,tied=true), mlp, glu(expansion=8), tokens, none"""
    shared: str = "none"
    """encoder of both modalities behind the towers, trained in full: none, mlp, transformer(n=1,pool=cls,points=2)"""
    image_px: int | None = None
    """image side in pixels, where it differs from the vision tower's own"""
    eval_tokens: int | None = None
    """caption length in evaluation and search, in tokens; default: the text tower's context"""
    loss: str = "softmax"
    """what compares the pairs of a batch: softmax(smoothing=0.1), sigmoid, hinge(margin=0.2,hardest=true); chunk=4096
    computes it in pieces of that size, in memory that grows with the batch and not with its square"""
    scale: float | None = None
    """the factor on cosines at the start; default: the loss's own, 1/0.07 for softmax, 10 for sigmoid"""
    scale_min: float = 1.0
    """lowest scale"""
    scale_max: float = 100.0
    """highest scale"""
    seed: int = 0
    """seed of the heads, the order of the data and the augmentation"""

    @property
    def policies(self) -> dict[str, str]:
        """What is trained in each tower, by side."""
        return {"vision": self.vision_policy or self.policy, "text": self.text_policy or self.policy}

    @property
    def policy_name(self) -> str:
        """What is trained, for people: one policy, or that of the vision and that of the text tower."""
        return " / ".join(dict.fromkeys(self.policies.values()))


@dataclass(frozen=True)
class TrainConfig(ModelConfig):
    """Everything that `lilt train` can be told."""

    data: str = "demo"
    """manifest (.jsonl, .csv, .tsv, Karpathy or LilT .json), WebDataset tars (shards/{00000..01234}.tar, or their
    folder), a Hugging Face dataset (hf:NAME_OR_FOLDER?captions=COLUMN), or demo"""
    val_data: str | None = None
    """manifest or Hugging Face dataset of the validation and test splits; default: data"""
    image_root: str | None = None
    """folder that image paths are relative to; default: the manifest's"""
    output: str | None = None
    """run folder; one that holds a run is refused unless --resume or --overwrite; default: a new one in runs/"""
    train_split: str = "train"
    """split to train on; train|restval joins two"""
    val_split: str = "val"
    """split that selects the best checkpoint; none trains without selection"""
    test_split: str = "test"
    """split reported before and after; none reports none"""
    max_images: int | None = None
    """train on the first images of a seeded shuffle"""
    shuffle_buffer: int = 65_536
    """pairs of neighbouring shards that are shuffled among one another; a manifest is shuffled as a whole"""
    resample: bool = False
    """draw shards (of a manifest: images) with replacement, instead of each once an epoch"""
    captions: str = "one"
    """one: a random caption of each image per epoch; all: each caption is a sample"""
    augment: str = "crop(0.9,1)"
    """training augmentation, such as crop(0.2,1)+hflip+randaugment(2,7), or none"""
    train_tokens: int | None = None
    """caption length in training, in tokens; default: the text tower's context"""
    same: str = "positive"
    """pairs of one batch with the same image or caption are: positive, ignored or negative"""
    init: str | None = None
    """run folder whose trained tensors this run starts from: the same towers, policies and heads"""
    epochs: float = 5
    """passes over the training split"""
    max_steps: int | None = None
    """stop after this many steps"""
    batch_size: int = 64
    """pairs per step over all processes together"""
    micro_batch: int | None = None
    """pairs per process whose activations are in memory at once, with the gradient of the whole batch; default: all"""
    spill: str = "auto"
    """where a step in micro-batches keeps images and what frozen blocks gave: auto: in memory while there is place,
    then on disk, in the run folder; disk; off: in memory"""
    teacher: str | None = None
    """image model to distil from, as a vision tower's spec; it sees the same views in its own normalisation"""
    distill: str = "contrastive"
    """what is learnt from the teacher: contrastive(bank=65536), mse, cosine, kl (of its classes) or relational"""
    distill_weight: float = 1.0
    """weight of the distillation beside the contrastive loss"""
    distill_image: float = 0.5
    """share of the image side in the distillation"""
    distill_text: float = 0.5
    """share of the text side, which learns from the teacher of its image"""
    lr: float | None = None
    """peak learning rate of the towers' trained tensors; default: each policy's own"""
    head_lr: float = 3e-3
    """peak learning rate of projection and scale"""
    lr_floor: float = 0.01
    """share of the peak where warm-up starts and the cosine ends"""
    warmup_steps: int | None = None
    """steps of linear warm-up; default: 5 %% of all"""
    optimizer: str = "adamw"
    """adamw, or adamw8bit: moments of large tensors in a quarter of the memory; needs bitsandbytes"""
    weight_decay: float = 0.02
    """AdamW decay of matrices; norms, biases and the scale have none"""
    beta2: float = 0.999
    """second moment of AdamW"""
    clip_norm: float | None = 1.0
    """largest gradient norm; none: no clipping"""
    reuse: str = "auto"
    """what frozen parts give of each image and caption is computed once and kept in memory or on disk; off: computed
    anew each time; auto: as it pays. Images need augment=none or views"""
    reuse_dtype: str | None = None
    """fp32, bf16 or fp16, as which it is kept, between the passes of a step too where it is given; default: fp32, or as
    in precision, and within a step as it is"""
    views: int | None = None
    """each image has so many augmented views, the same in all epochs; default: a new one each time"""
    precision: str = "no"
    """no (fp32), bf16 or fp16"""
    checkpointing: bool = False
    """keep of each block of the towers its input alone and compute it again on the way back: less memory, more time"""
    compile: bool = False
    """compile the blocks of both towers: the first steps take minutes, the others less time"""
    compile_backend: str = "inductor"
    """what compiles them: inductor, which on CPU needs a C++ compiler, or another backend of torch.compile"""
    workers: int = 2
    """data loading processes per training process"""
    eval_every: float = 1.0
    """epochs between validations"""
    log_every: int = 10
    """steps between lines in metrics.jsonl"""
    max_bad_steps: int = 3
    """stop after this many steps in a row whose gradient is not finite; each of them is left out"""
    keep_states: int = 1
    """how many of the newest resume states are kept"""
    max_bad_share: float = 0.01
    """stop when more than this share of the training images cannot be read"""
    price: float | None = None
    """dollars that an hour of one accelerator costs; what the run cost is then reported in dollars too"""
    resume: bool = False
    """go on where the run in --output was stopped"""
    overwrite: bool = False
    """replace the run in --output"""
