"""JupyterLab for this project, started by `make lab`.

JupyterLab writes the kernel's name and Python's version into every notebook it opens, and so marks it as modified. Here
they are added when a notebook is read and removed when it is saved, and the file on disk stays as nbdev cleans it.
"""
from ipykernel.ipkernel import IPythonKernel
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from nbdev.clean import clean_nb
from nbdev.config import get_config

config = get_config()
KEPT = {
    "allowed_metadata_keys": config.get("allowed_metadata_keys").split(),
    "allowed_cell_metadata_keys": config.get("allowed_cell_metadata_keys").split(),
    "clean_ids": True,
}


def kernel_metadata() -> dict:
    "What JupyterLab writes into a notebook with this kernel."
    spec = KernelSpecManager().get_kernel_spec("python3")
    kernel = {"display_name": spec.display_name, "language": spec.language, "name": "python3"}
    return {"kernelspec": kernel, "language_info": dict(IPythonKernel.language_info)}


class CleanNotebooks(AsyncLargeFileManager):
    "Notebooks look as if this kernel had saved them."

    async def get(self, path, content=True, **options):
        model = await super().get(path, content=content, **options)
        if content and model["type"] == "notebook":
            model["content"]["metadata"].update(kernel_metadata())
        return model


def clean_before_saving(model: dict, **_) -> None:
    "Remove what depends on the machine: execution counts, ids of cells, the kernel."
    if model["type"] == "notebook":
        clean_nb(model["content"], **KEPT)


c.ServerApp.contents_manager_class = CleanNotebooks  # noqa: F821 (Jupyter defines c)
c.FileContentsManager.pre_save_hook = clean_before_saving  # noqa: F821
