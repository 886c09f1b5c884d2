"""Configuration of runs: the schema, YAML presets and DeepSpeed JSON files. Imports no torch, so a typo is
reported in milliseconds."""

from configs.decoder_gan import DecoderGan
from configs.load import fingerprint, load_config, load_run, to_yaml
from configs.run import RunConfig
from configs.schema import Config
from configs.section import UserError

__all__ = ["Config", "DecoderGan", "RunConfig", "UserError", "fingerprint", "load_config", "load_run", "to_yaml"]
