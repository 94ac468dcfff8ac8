"""The dashboard of jobs: what trains, how fast, and on which machines."""

from __future__ import annotations

from k8s.monitoring.grafana import Dashboard, Panel

TRAINING = Dashboard(
    "training",
    "Accord: training",
    [
        (
            "Jobs",
            [
                Panel(
                    "Jobs by state",
                    [("sum by (deployment_status) (kuberay_job_deployment_status)", "{{deployment_status}}")],
                ),
                Panel(
                    "Duration",
                    [
                        (
                            "max by (name, job_deployment_status) (kuberay_job_execution_duration_seconds)",
                            "{{name}} {{job_deployment_status}}",
                        )
                    ],
                    "s",
                ),
                Panel(
                    "Nodes",
                    [
                        (
                            "count by (accord_dev_stage)"
                            ' (ray_node_cpu_count{app_kubernetes_io_component="job"})',
                            "{{accord_dev_stage}}",
                        )
                    ],
                ),
            ],
        ),
        (
            "Learning",
            [
                Panel(
                    "Loss",
                    [('max by (run) (ray_accord_train_value{metric="loss"})', "{{run}}")],
                ),
                Panel(
                    "Reward: mean weight of a batch",
                    [('max by (run) (ray_accord_train_value{metric="weight_mean"})', "{{run}}")],
                    about="What images weigh in fine-tuning: their reward, or what the recipe makes of it",
                ),
                Panel(
                    "Accuracy, of what is validated",
                    [
                        (
                            'max by (run, metric) (ray_accord_train_value{metric=~".*(accuracy|auc).*"})',
                            "{{run}} {{metric}}",
                        )
                    ],
                    about="Of reward learning",
                ),
                Panel(
                    "Steps done",
                    [
                        (
                            "max by (run) (ray_accord_train_step) / max by (run) (ray_accord_train_steps)",
                            "{{run}}",
                        )
                    ],
                    "percentunit",
                ),
                Panel(
                    "Images learned from",
                    [("max by (run) (ray_accord_train_images_per_second)", "{{run}}")],
                    "ops",
                ),
                Panel(
                    "Steps",
                    [("max by (run) (ray_accord_train_steps_per_second)", "{{run}}")],
                    "ops",
                ),
            ],
        ),
        (
            "Work",
            [
                Panel(
                    "Images generated",
                    [
                        (
                            "sum by (accord_dev_stage, dataset) (deriv(ray_data_output_rows[10m]))",
                            "{{accord_dev_stage}} {{dataset}}",
                        )
                    ],
                    "rowsps",
                ),
                Panel(
                    "Time blocked in reports",
                    [
                        (
                            "sum by (ray_train_run_name) (ray_train_report_total_blocked_time_s)",
                            "{{ray_train_run_name}}",
                        )
                    ],
                    "s",
                ),
                Panel(
                    "Time to move checkpoints",
                    [
                        (
                            "sum by (ray_train_run_name) (ray_train_checkpoint_transfer_total_time_s)",
                            "{{ray_train_run_name}}",
                        )
                    ],
                    "s",
                ),
            ],
        ),
        (
            "Machines",
            [
                Panel(
                    "GPU utilisation",
                    [
                        (
                            "avg by (accord_dev_stage, instance)"
                            ' (ray_node_gpus_utilization{app_kubernetes_io_component="job"})',
                            "{{accord_dev_stage}} {{instance}}",
                        )
                    ],
                    "percent",
                ),
                Panel(
                    "CPU",
                    [
                        (
                            "avg by (accord_dev_stage, instance)"
                            ' (ray_node_cpu_utilization{app_kubernetes_io_component="job"})',
                            "{{accord_dev_stage}} {{instance}}",
                        )
                    ],
                    "percent",
                ),
                Panel(
                    "Memory",
                    [
                        (
                            "max by (accord_dev_stage, instance)"
                            ' (ray_node_mem_used{app_kubernetes_io_component="job"}'
                            ' / ray_node_mem_total{app_kubernetes_io_component="job"})',
                            "{{accord_dev_stage}} {{instance}}",
                        )
                    ],
                    "percentunit",
                ),
                Panel(
                    "Disk of the runs",
                    [
                        (
                            "1 - min by (persistentvolumeclaim) (kubelet_volume_stats_available_bytes"
                            '{namespace="accord"} / kubelet_volume_stats_capacity_bytes)',
                            "{{persistentvolumeclaim}}",
                        )
                    ],
                    "percentunit",
                    bound=0.8,
                ),
            ],
        ),
    ],
)
