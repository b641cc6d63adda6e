"""Names and version of the export folder: `checkpoint/export.py` writes it, `inference/load.py` reads it."""

EXPORT_FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
INDEX_FILE = "model.safetensors.index.json"
TEXT_MODEL_FILE = "text.model"
IMAGE_TOKENIZER_FOLDER = "image_tokenizer"
