"""`jmp-train explain`: the placement of parameters on devices that are not here, against sums by hand."""

from jmp_train.cli.main import main


def test_each_parameter_has_its_placement_and_bytes(capsys):
    rule = "layers/1/kernel=replicated"
    assert main(["explain", "mlp_fp16", "--mesh", "fsdp=4", "--placement", rule]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line.startswith("layers/")}
    assert rows["layers/0/kernel"][1:4] == ["64x256", "float32", "-,fsdp"]
    assert rows["layers/0/kernel"][-1] == f"{64 * 256:,}"  # four bytes each, a quarter
    assert rows["layers/1/kernel"][3:] == ["replicated", "layers/1/kernel", f"{256 * 256 * 4:,}"]
    whole = 4 * (64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10)
    alone = 4 * (256 * 256 + 10)  # by the rule, and as 4 does not divide 10
    held = (whole - alone) // 4 + alone
    assert f"parameters: {held:,} bytes per device of {whole:,} ({held / whole:.1%})" in lines
    assert f"on each device whole: 2 parameters of {alone:,} bytes" in lines
    assert "mesh fsdp=4: 4 devices, 32 examples of each batch on each" in lines


def test_a_mesh_that_does_not_divide_the_batch_is_one_line(capsys):
    assert main(["explain", "mlp_fp16", "--mesh", "fsdp=3"]) == 2
    error = capsys.readouterr().err
    assert "batch_size is 128, and the mesh fsdp=3" in error and error.count("\n") == 1


def test_bundled_models_are_placed_by_their_rules_where_there_is_an_axis_tensor(capsys):
    """Of the gpt: 4 blocks of width 128, an inner width of 320, four bytes a number."""
    assert main(["explain", "gpt_bf16", "--mesh", "data=2,fsdp=2,tensor=2"]) == 0
    rows = {x.split()[0]: x.split()[2:] for x in capsys.readouterr().out.splitlines() if "x" in x}
    split = {
        "blocks/attention/qkv/kernel": ("-,fsdp+tensor,-", "**/qkv/kernel", 4 * 128 * 384),
        "blocks/attention/out/kernel": ("-,tensor,fsdp", "**/attention/out/kernel", 4 * 128 * 128),
        "blocks/mlp/up/kernel": ("-,fsdp+tensor,-", "**/mlp/up/kernel", 4 * 128 * 640),
        "blocks/mlp/down/kernel": ("-,tensor,fsdp", "**/mlp/down/kernel", 4 * 320 * 128),
    }
    for path, (axes, rule, size) in split.items():
        assert rows[path] == ["float32", axes, rule, f"{size * 4 // 4:,}"]
    for name, rules in (("vit_bf16", ("**/up/kernel", "**/down/kernel")), ("mlp_bf16", ())):
        assert main(["explain", name, "--mesh", "tensor=2", "--batch-size", "64"]) == 0
        printed = capsys.readouterr().out
        assert "tensor" in printed and all(f" {rule} " in printed for rule in rules)
    assert main(["explain", "gpt_bf16", "--mesh", "fsdp=4"]) == 0
    assert "**/" not in capsys.readouterr().out
