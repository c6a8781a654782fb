"""Answers questions about an image or a video, in Emu3-Chat's prompt.

    python -m emu3_jax.launch --config=configs/chat.py --config.model.tokenizer=DIR \
        --config.model.decoder=DIR --config.model.vocab=emu3 --config.image=cat.jpg \
        --config.questions="('What is this?', 'What colour is it?')"

Without questions it reads them, a line each. For a video: --config.video=clip.mp4
--config.canvas.fps=2 --config.canvas.seconds=8. DIR is a run of ours or published weights.
Hardware: any; Emu3's 8B needs 20 GB on one device. Expected result: the answers, the likeliest text
(--config.sampling.temperature=1 draws).
"""

from inference.chat import Chat


def get_config() -> Chat:
    """The job."""
    return Chat()
