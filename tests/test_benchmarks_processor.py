from jaxtrain.benchmarks import processor


def test_the_peak_of_bfloat16_is_never_below_that_of_float32():
    peaks = {"jax float32": 3.0, "jax bfloat16": 2.0, "torch float32": 4.0, "torch bfloat16": 1.0}
    assert processor.peak_for("float32", peaks) == processor.peak_for("bfloat16", peaks) == 4.0
    assert processor.peak_for("bfloat16", peaks | {"jax bfloat16": 9.0}) == 9.0


def test_the_text_names_the_processor_and_warns_only_of_load():
    about = processor.describe_machine()
    quiet = processor.machine_text(about | {"load_average": [0.0, 0.0, 0.0]})
    busy = processor.machine_text(about | {"load_average": [9.0 * about["cores"], 0.0, 0.0]})
    assert about["cpu"] in quiet and "bf16 instructions" in quiet and "WARNING" not in quiet
    assert "WARNING" in busy
