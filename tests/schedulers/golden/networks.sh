# none
# tcp
export NCCL_IB_DISABLE=1
export NCCL_NET=Socket
# ib
export NCCL_IB_HCA=mlx5
export NCCL_NET=IB
# roce
export NCCL_IB_HCA=mlx5
export NCCL_IB_ROCE_VERSION_NUM=2
export NCCL_NET=IB
# efa
export FI_EFA_FORK_SAFE=1
export FI_PROVIDER=efa
export NCCL_NET='AWS Libfabric'
