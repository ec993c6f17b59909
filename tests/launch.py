"""What `accelerate launch` makes of a config: the environment of the processes that it starts."""

from __future__ import annotations

from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

CONFIGS = sorted((Path(__file__).parent.parent / "recipes" / "accelerate").glob("*.yaml"))
OURS = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")


def environment(config: Path) -> dict[str, str]:
    """Return the variables that Accelerate reads in a process that was launched with a config."""
    given = ["--config_file", str(config), "--main_process_port", "0", "train.py"]
    args, config_class, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(config_class.deepspeed_config)
        found = prepare_deepspeed_cmd_env(args)[1]
    elif args.multi_gpu or args.use_fsdp:
        found = prepare_multi_gpu_env(args)
    else:
        found = prepare_simple_launcher_cmd_env(args)[1]
    return {name: value for name, value in found.items() if name.startswith(OURS)}
