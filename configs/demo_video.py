"""The video demo: a model that sees two seconds' first half, and predicts the other.

    python -m emu3_jax.launch --config=configs/demo_video.py            all stages
    python -m emu3_jax.launch --config=configs/demo_video.py:decoder    one stage: clips,
        vocabulary, tokenizer, store, decoder, predict, evaluate or report

Hardware: any CPU. Time: see README. Expected result: runs/demo_video/report.html, in which the
model's frames are nearer to the real ones than the last frame repeated, and than each pixel's
straight line. Fields of a stage are changed as in --config.decoder.steps=2000, or
--config.steps=2000 where the stage runs alone.
"""

from data_pipelines.clip_rows import ClipRows
from data_pipelines.documents import Layout, Weights
from data_pipelines.drawn_clips import SIZE, DrawnClips
from data_pipelines.encode import Encode
from data_pipelines.mixture import Component, Mixture
from data_pipelines.sources import Videos
from data_pipelines.vocabulary import TrainVocab
from demo.continuation import Continue
from demo.pipeline import VideoDemo
from demo.prediction import Evaluate
from demo.video_report import VideoReport
from emu3_jax.optim import AdamW
from emu3_jax.train import Train
from emu3_jax.transformer import Transformer
from inference.artist import Model
from tokenizer.train import TokenizerTask
from tokenizer.vq import VQConfig

CODES, RANKS = 1024, 300
TEXT = RANKS + 3 + 205 + 3  # what stands before the visual codes: see emu3_jax/vocab.py
# Of a caption and its frame rate everything is given, of a frame the breaks are: codes are learnt.
FRAMES_ONLY = Weights.generation()


def build(run_dir: str, clips: int, tokenizer_steps: int, decoder_steps: int) -> VideoDemo:
    """The stages in one run directory; `clips` are drawn to learn from."""
    folder, store, vocab = f"{run_dir}/clips", f"{run_dir}/store", f"{run_dir}/vocab.tiktoken"
    predicted = f"{run_dir}/predicted"
    tokenizer = VQConfig(
        codebook_size=CODES, code_dim=8, latent_channels=8, width=32, multipliers=(1, 1, 2),
        res_blocks=1, attention_levels=(2,),
    )  # fmt: skip
    decoder = Transformer(
        layers=4, width=128, heads=4, kv_heads=4, head_dim=32, ffn=384, vocab=TEXT + CODES,
        first_visual=TEXT, dropout=0.0, init_std=0.05, dtype="float32", remat="none", unroll=4,
        rope_theta=1e3,  # a clip has 330 tokens: what moves is found by its exact distance
    )  # fmt: skip
    return VideoDemo(
        run_dir=run_dir,
        clips=DrawnClips(folder, train=clips),
        vocabulary=TrainVocab(images=folder, path=vocab, size=RANKS),
        tokenizer=Train(
            task=TokenizerTask(
                tokenizer, average_codes=True, hits_decay=0.99,
                restart_until=tokenizer_steps * 4 // 5, patches=True,
            ),
            data=ClipRows(folder, "train.jsonl", frames=4, augment_flip=True),
            run_dir=f"{run_dir}/tokenizer",
            steps=tokenizer_steps,
            log_every=50,
            save_every=200,
            batch=8,
            optimizer=AdamW(rate=2e-3, warmup=30, b1=0.5, b2=0.99, weight_decay=0.0, clip=1.0),
        ),
        store=Encode(
            source=Videos(folder, "train.jsonl"), tokenizer=f"{run_dir}/tokenizer", vocab=vocab,
            codes=CODES, directory=store, tokens=1024, min_pixels=SIZE**2, max_pixels=SIZE**2,
            factor=tokenizer.spatial_factor, fps=0.0, seconds=0.0, licence="Apache-2.0 (drawn)",
        ),  # fmt: skip
        decoder=Train(
            task=decoder,
            data=Mixture(
                components=(Component(store, Layout("caption_first", 0.1, weights=FRAMES_ONLY)),),
                vocab=vocab, codes=CODES, length=336,
            ),
            run_dir=f"{run_dir}/decoder",
            steps=decoder_steps,
            batch=8,
            save_every=100,
            optimizer=AdamW(rate=3e-3, warmup=60, weight_decay=0.1, clip=1.0),
        ),
        predict=Continue(
            Model(f"{run_dir}/tokenizer", f"{run_dir}/decoder", vocab), folder, predicted
        ),
        evaluate=Evaluate(predicted=predicted, path=f"{run_dir}/evaluation.json"),
        report=VideoReport(run_dir, predicted),
    )  # fmt: skip


def get_config(stage: str = ""):
    """The fifteen-minute demo: 2,500 clips of shapes that move."""
    job = build("runs/demo_video", clips=2500, tokenizer_steps=400, decoder_steps=900)
    return job.stage(stage)
