from pixeldecoder import TinyLatentEncoder  # noqa: F401
