"""Recipes: a typed dataclass, filled from a YAML file and the command line by jsonargparse."""

import difflib
import json
import re
from argparse import ArgumentParser as PlainParser
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import timm
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # they are the help of the options

RECIPE_FILE = 'recipe.yaml'


class Launch(NamedTuple):
    """What a command line says besides the recipe.

    Attributes:
        name: Name of the recipe, after its file.
        output: Folder for the run, None for one under `runs/`.
        resume: Folder of the run to continue, None for a new one.
    """

    name: str
    output: Path | None
    resume: Path | None


class RecipeParser(ArgumentParser):
    """Parser of a training script: `--config`, `--output`, `--resume` and an option for each field of the recipe."""

    def __init__(self, recipe_class: type, description: str | None, default_config: Path):
        """Create the parser.

        Args:
            recipe_class: Dataclass whose fields, defaults and field docstrings become the options.
            description: First lines of `--help`.
            default_config: Recipe that is used when the command line names none.
        """
        super().__init__(description=description, allow_abbrev=False)
        self.recipe_class = recipe_class
        self.default_config = default_config
        self.add_argument(
            '--config', action=ActionConfigFile, help=f'recipe to start from, a YAML file; {default_config} if none'
        )
        self.add_argument('--output', help='folder for the run, runs/NAME if not given')
        self.add_argument(
            '--resume',
            nargs='?',
            const='latest',
            help='continue a run from its last finished epoch: its folder, or the one at --output, or the newest',
        )
        self.add_class_arguments(recipe_class, as_group=False)

    def parse_recipe(self, argv: list[str] | None = None) -> tuple[Any, Launch]:
        """Parse a command line; a run that is resumed brings its own recipe, which further options override.

        Args:
            argv: Arguments, those of the process if None.

        Returns:
            The recipe and the launch.

        Raises:
            SystemExit: On an unknown key or a value of the wrong type, after printing which, and the nearest valid key.
        """
        where = PlainParser(add_help=False, allow_abbrev=False)
        where.add_argument('--config')
        where.add_argument('--output')
        where.add_argument('--resume', nargs='?', const='latest')
        known, rest = where.parse_known_args(argv)
        name = _recipe_name(Path(known.config or self.default_config))
        output = Path(known.output) if known.output else None
        resume = self._find_run(known.resume, output, name) if known.resume else None
        configs = [resume / RECIPE_FILE] if resume else []
        if known.config or not resume:
            configs.append(known.config or self.default_config)
        options = self.parse_args([*(part for config in configs for part in ('--config', str(config))), *rest])
        recipe = self.recipe_class(**{field: options[field] for field in self.recipe_class.__dataclass_fields__})
        return recipe, Launch(name, output, resume)

    def _find_run(self, resume: str, output: Path | None, name: str) -> Path:
        if resume != 'latest':
            candidates = [Path(resume)]
        elif output:
            candidates = [output]
        else:
            candidates = sorted(Path('runs').glob(f'{name}*'), key=lambda path: path.stat().st_mtime, reverse=True)
        for folder in candidates:
            if (folder / RECIPE_FILE).is_file():
                return folder
        where = candidates[0] if candidates else f'runs/{name}*'
        self.error(f'no run to resume at {where}: give the folder that the run printed, --resume FOLDER')

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Add the nearest valid key to a message about an unknown one, and exit."""
        valid = [option.lstrip('-') for action in self._actions for option in action.option_strings]
        for key in re.findall(r"(?:Option '|--)([\w.]+)", message):
            near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
            if key not in valid and near:
                message += f"\n  Did you mean '{near[0]}' instead of '{key}'?"
        super().error(message, ex)


def _recipe_name(config: Path) -> str:
    parent = config.resolve().parent.name
    return config.stem if parent == 'recipes' else f'{parent}-{config.stem}'


def recipe_as_yaml(recipe: Any) -> str:
    """A recipe as YAML that `--config` reads back."""
    values = {name: getattr(recipe, name) for name in recipe.__dataclass_fields__}
    return yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False)  # by JSON, for plain lists and numbers


def check_architecture(name: str, family: str) -> None:
    """Make sure that a recipe's model is one that its script can train.

    Args:
        name: Of the model, with or without the tag of its weights.
        family: Module that registers the models that are meant: `pcb` or `l2net`.

    Raises:
        ValueError: If it is not; names those that are.
    """
    known = timm.list_models(module=family)
    if name not in known and (name.split('.')[0] not in known or name not in timm.list_pretrained()):
        raise ValueError(f'--model {name}: this script trains {", ".join(known)}')


def model_arguments(recipe: Any) -> dict[str, Any]:
    """Arguments of the model that differ from the defaults of its name."""
    given = {'attn_stages': recipe.attn_stages, 'attn_kwargs': recipe.attn_kwargs or None}
    return {**recipe.model_args, **{name: value for name, value in given.items() if value is not None}}
