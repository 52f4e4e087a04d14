"""``--flower DIR``: writes a Flower project of a run instead of playing the run."""

from fedkern.cli.request import Given, Request, read_given
from fedkern.flower.runs.project import Project
from fedkern.flower.runs.run_settings import check_own_data, check_portable
from fedkern.settings.model import check_networks
from fedkern.settings.run_data import find_decided, kept_data, load_data


def write_project(request: Request) -> int:
    assert request.flower is not None
    choices = read_given(request)
    config = choices.config()
    check_networks(request.settings, config.data)
    config.for_user(request.settings)
    check_portable(config)
    if request.own_data:
        check_own_data(config)
    project = Project(
        method=choices.method, settings=choices.settings, options=choices.options, data_options=choices.data_options,
        plugins=[*config.plugins], out=None if request.out is None else request.out.absolute(),
        own_data=request.own_data, report=request.report, predictions=request.predictions, clients=_clients(choices),
    )  # fmt: skip
    files = project.write(request.flower)
    print(f"Flower project: {request.flower}")
    print(f"files:          {', '.join(path.name for path in files)}")
    print("commands:       README.md")
    return 0


def _clients(choices: Given) -> list[str]:
    config = choices.config()
    if "clients" not in config.unset:
        return [str(k) for k in range(config.trained_clients)]
    data = load_data(config, masks=False)
    data = kept_data(config.replace(**find_decided(config, data)), data)
    return [str(data.client_label(k)) for k in range(len(data.clients))]
