"""The demo: from OpenMoji's pictures to a model that draws and captions them.

    python -m emu3_jax.launch --config=configs/demo.py            all stages (make demo)
    python -m emu3_jax.launch --config=configs/demo.py:decoder    one stage: images, vocabulary,
        tokenizer, store, decoder, draw, evaluate, export or report

Hardware: any CPU. Time: see README. Expected result: runs/demo/report.html; fields of a stage are
changed as in --config.decoder.steps=2000, or --config.steps=2000 where the stage runs alone.
"""

from data_pipelines.documents import Layout, Weights
from data_pipelines.encode import Encode
from data_pipelines.image_folder import ImageRows
from data_pipelines.mixture import Component, Mixture
from data_pipelines.openmoji import OpenMoji
from data_pipelines.sources import Images
from data_pipelines.vocabulary import TrainVocab
from demo.draw import Draw
from demo.evaluate import Evaluate
from demo.export import Export
from demo.pipeline import Demo
from demo.report import Report
from emu3_jax.optim import AdamW
from emu3_jax.sampling import Sampling
from emu3_jax.train import Train
from emu3_jax.transformer import Transformer
from tokenizer.exchange import Convert
from tokenizer.train import TokenizerTask
from tokenizer.vq import VQConfig

CODES, RANKS = 1024, 512
# Pictures without a caption in front are not worth learning by heart by a model of this size.
CAPTION_ONLY = Weights(text=1.0, meta=0.0, codes=0.0, breaks=0.0)
TEXT = RANKS + 3 + 205 + 3  # what stands before the visual codes: see emu3_jax/vocab.py


def build(
    run_dir: str, select: tuple[str, ...], people: int, tokenizer_steps: int, decoder_steps: int
) -> Demo:
    """The stages in one run directory; `select` and `people` say what the decoder learns."""
    images, store = f"{run_dir}/images", f"{run_dir}/store"
    vocab, drawn = f"{run_dir}/vocab.tiktoken", f"{run_dir}/drawn"
    tokenizer = VQConfig(
        codebook_size=CODES, code_dim=8, latent_channels=8, width=32, multipliers=(1, 1, 2),
        res_blocks=1, attention_levels=(2,),
    )  # fmt: skip
    decoder = Transformer(
        layers=6, width=192, heads=3, kv_heads=3, head_dim=64, ffn=512, vocab=TEXT + CODES,
        first_visual=TEXT, dropout=0.0, init_std=0.05, dtype="float32", remat="none", unroll=6,
    )  # fmt: skip
    data = Mixture(
        components=(
            Component(store, Layout("caption_first", caption_dropout=0.1), weight=0.7),
            Component(store, Layout("caption_last", weights=CAPTION_ONLY), weight=0.3),
        ),
        vocab=vocab, codes=CODES, length=176,
    )  # fmt: skip
    return Demo(
        run_dir=run_dir,
        images=OpenMoji(directory=images, select=select, people=people),
        vocabulary=TrainVocab(images=images, path=vocab, size=RANKS),
        tokenizer=Train(
            task=TokenizerTask(
                tokenizer, average_codes=True, hits_decay=0.99,
                restart_until=tokenizer_steps * 4 // 5, patches=True,
            ),
            data=ImageRows(directory=images, list="tokenizer_train.jsonl", augment_flip=True),
            run_dir=f"{run_dir}/tokenizer",
            steps=tokenizer_steps,
            log_every=100,
            save_every=500,
            batch=8,
            optimizer=AdamW(rate=2e-3, warmup=30, b1=0.5, b2=0.99, weight_decay=0.0, clip=1.0),
        ),
        store=Encode(
            source=Images(images, "train.jsonl"), tokenizer=f"{run_dir}/tokenizer", vocab=vocab,
            codes=CODES, directory=store, min_pixels=32 * 32, max_pixels=32 * 32,
            factor=tokenizer.spatial_factor, licence="CC BY-SA 4.0 (OpenMoji)",
        ),  # fmt: skip
        decoder=Train(
            task=decoder,
            data=data,
            run_dir=f"{run_dir}/decoder",
            steps=decoder_steps,
            batch=16,
            save_every=100,
            optimizer=AdamW(rate=2e-3, warmup=60, weight_decay=0.1, clip=1.0),
        ),
        draw=Draw(
            images=images, tokenizer=f"{run_dir}/tokenizer", decoder=f"{run_dir}/decoder",
            vocab=vocab, directory=drawn, sampling=Sampling(guidance=1.5, temperature=0.0),
        ),
        evaluate=Evaluate(
            images=images, tokenizer=f"{run_dir}/tokenizer", drawn=drawn,
            path=f"{run_dir}/evaluation.json",
        ),
        export=Export(
            Convert(
                source=run_dir, target=f"{run_dir}/hf", vocab=vocab, context=176,
                min_pixels=32 * 32, max_pixels=32 * 32,
            ),
            decoder=f"{run_dir}/decoder",
            data=data,
        ),
        report=Report(run_dir=run_dir, drawn=drawn),
    )  # fmt: skip


def get_config(stage: str = ""):
    """The fifteen-minute demo: 200 people in their skin tones."""
    job = build("runs/demo", ("people",), 200, tokenizer_steps=2400, decoder_steps=920)
    return job.stage(stage)
