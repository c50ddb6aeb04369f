"""OpenVINO's intermediate representation, exported by optimum-intel.

int8 is nncf's symmetric one: a scale per output channel, in embedding and head too.
"""

import shutil
from pathlib import Path

from bench.conversions import main


def convert(folder: Path, output: Path, dtype: str, quantization: str | None) -> None:
    """Writes `output`/openvino_model.xml, without tokenizers: the benches speak in token ids.

    Raises:
        ValueError: a quantization that is not known here.
    """
    import nncf
    import openvino
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig

    if quantization not in (None, "int8"):
        raise ValueError(f"quantization={quantization!r} is not converted")
    kind = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[dtype]
    exported = output / "unquantized" if quantization else output
    main_export(
        str(folder), exported, task="text-generation-with-past", ov_config=OVConfig(dtype=kind)
    )
    if quantization:
        model = openvino.Core().read_model(exported / "openvino_model.xml")
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
        openvino.save_model(model, output / "openvino_model.xml")
        del model  # it maps the file that goes now
        shutil.copy(exported / "config.json", output)
        shutil.copy(exported / "generation_config.json", output)
        shutil.rmtree(exported)


if __name__ == "__main__":
    main(convert)
