"""What NCCL needs between the GPU nodes of GKE: one entry for each fabric, as data.

From AI-Hypercomputer/gpu-recipes and GoogleCloudPlatform/container-engine-accelerators. Nothing
here has run on such a cluster.
"""

import dataclasses

NVIDIA = "/usr/local/nvidia"  # the driver's libraries, in the container
INSTALLED = "/home/kubernetes/bin"  # where GKE's installers put them on the node


@dataclasses.dataclass(frozen=True)
class Fabric:
    """`networks` are the usual names of eth1, eth2, ...; `hosts` maps paths in the container to
    the node's; `script` is sourced before the command; `daemon` runs beside it."""

    env: dict[str, str]
    networks: tuple[str, ...] = ()
    hosts: dict[str, str] = dataclasses.field(default_factory=dict)
    script: str = ""
    daemon: bool = False


LIBRARIES = {NVIDIA: f"{INSTALLED}/nvidia"}
FABRICS = {
    # Plain TCP over one card: right, and slow. GPUDirect-TCPX is not rendered.
    "tcp": Fabric(
        env=dict(LD_LIBRARY_PATH=f"{NVIDIA}/lib64", NCCL_SOCKET_IFNAME="eth0"), hosts=LIBRARIES
    ),
    # A3 Ultra's RDMA: NCCL's variables come from a script of the installer (nccl-rdma-installer).
    "gib": Fabric(
        env=dict(LD_LIBRARY_PATH=f"/usr/local/gib/lib64:{NVIDIA}/lib64"),
        networks=("gvnic-1", *(f"rdma-{i}" for i in range(8))),
        hosts=LIBRARIES | {"/usr/local/gib": f"{INSTALLED}/gib"},
        script="/usr/local/gib/scripts/set_nccl_env.sh",
    ),
    # A3 Mega's GPUDirect-TCPXO ("FasTrak"), whose daemon receives on behalf of the GPUs.
    "tcpxo": Fabric(
        env=dict(
            LD_LIBRARY_PATH=f"{NVIDIA}/lib64",
            NCCL_ALGO="Ring,Tree",
            NCCL_PROTO="Simple",
            NCCL_NVLS_ENABLE="0",
            NCCL_SOCKET_IFNAME="eth0",
            NCCL_FASTRAK_CTRL_DEV="eth0",
            NCCL_FASTRAK_IFNAME=",".join(f"eth{i}" for i in range(1, 9)),
            NCCL_FASTRAK_LLCM_DEVICE_DIRECTORY="/dev/aperture_devices",
            NCCL_FASTRAK_USE_LLCM="1",
            NCCL_FASTRAK_USE_SNAP="1",
            NCCL_FASTRAK_NUM_FLOWS="2",
            NCCL_FASTRAK_PLUGIN_ACCEPT_TIMEOUT_MS="600000",
            NCCL_FASTRAK_ENABLE_CONTROL_CHANNEL="0",
        ),
        networks=tuple(f"vpc{i}" for i in range(1, 9)),
        hosts=LIBRARIES | {"/dev/aperture_devices": "/dev/aperture_devices"},
        daemon=True,
    ),
}
DAEMON = "us-docker.pkg.dev/gce-ai-infra/gpudirect-tcpxo/tcpgpudmarxd-dev"  # its image
DAEMON_COMMAND = ["/bin/sh", "-c", "chmod 755 /fts/entrypoint_rxdm_container.sh && "
                  "exec /fts/entrypoint_rxdm_container.sh --num_hops=2 --num_nics=8 --uid= "
                  "--alsologtostderr"]  # fmt: skip
DAEMON_HOSTS = LIBRARIES | {"/hostsysfs": "/sys", "/hostprocsysfs": "/proc/sys"}
DAEMON_DEVICES = (*(f"/dev/nvidia{i}" for i in range(8)), "/dev/nvidiactl", "/dev/nvidia-uvm",
                  "/dev/dmabuf_import_helper")  # fmt: skip
