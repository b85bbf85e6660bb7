"""Every field that we write into a manifest, and no other: these types are the closed schema that `schema.py` checks.

Source of names and meanings: kubernetes.io/docs/reference (v1.32) and KubeRay's API (ray-project/kuberay@feeaf72,
apis/ray/v1). A field that nobody writes is left out on purpose: an override that uses it, or misspells one, is refused.
"""

from typing import Annotated, Any, Literal, NotRequired, TypedDict

from cluster.kube.schema import MaxLength, Pattern, Range

Manifest = dict[str, Any]
"""One document of the stream, before or after it was checked."""

_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
Name = Annotated[str, Pattern(rf"{_LABEL}(\.{_LABEL})*"), MaxLength(253)]
"""RFC 1123 subdomain."""
ShortName = Annotated[str, Pattern(_LABEL)]
"""RFC 1123 label."""
JobName = Annotated[str, Pattern(r"[a-z]([a-z0-9-]*[a-z0-9])?"), MaxLength(47)]
"""RFC 1035 label. Source of the length: KubeRay, controllers/ray/utils/constant.go (MaxRayJobNameLength)."""
Quantity = Annotated[str, Pattern(r"([0-9]+(\.[0-9]+)?|\.[0-9]+)(m|k|[KMGTPE]i|[MGTPE])?")]
"""Always text: the CRD refuses `cpu: 0.5` as a number."""
Count = Annotated[int, Range(0, 2**31 - 1)]
Positive = Annotated[int, Range(1, 2**31 - 1)]
Port = Annotated[int, Range(1, 65535)]
EnvName = Annotated[str, Pattern(r"[A-Za-z_][A-Za-z0-9_]*")]
PinnedImage = Annotated[
    str, Pattern(r"[a-z0-9][a-z0-9._/:-]*(@sha256:[0-9a-f]{64}|:(?!latest$)[A-Za-z0-9_][A-Za-z0-9_.-]*)")
]
"""An image with a digest, or with a tag that is not `latest`."""
LabelValue = Annotated[str, Pattern(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")]
LabelKey = Annotated[str, Pattern(r"([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")]
Labels = dict[LabelKey, LabelValue]


class Metadata(TypedDict):
    """What every object has."""

    name: Name
    namespace: NotRequired[ShortName]
    labels: NotRequired[Labels]
    annotations: NotRequired[dict[LabelKey, str]]


class PodMetadata(TypedDict):
    """Of a pod template: KubeRay gives the name."""

    labels: Labels
    annotations: NotRequired[dict[LabelKey, str]]


# ---- pods


class SecretKeyRef(TypedDict):
    """One key of a Secret."""

    name: Name
    key: str


class FieldRef(TypedDict):
    """A field of the pod itself."""

    fieldPath: str


class EnvSource(TypedDict):
    """Where an environment variable comes from."""

    secretKeyRef: NotRequired[SecretKeyRef]
    fieldRef: NotRequired[FieldRef]


class Env(TypedDict):
    """One environment variable."""

    name: EnvName
    value: NotRequired[str]
    valueFrom: NotRequired[EnvSource]


class NameRef(TypedDict):
    """A reference by name."""

    name: Name


class EnvFrom(TypedDict):
    """All keys of a Secret as environment variables."""

    secretRef: NameRef


Requirements = TypedDict("Requirements", {"cpu": Quantity, "memory": Quantity, "nvidia.com/gpu": Quantity}, total=False)


class Resources(TypedDict):
    """What a container asks for, and what it may not exceed."""

    requests: Requirements
    limits: Requirements


class Capabilities(TypedDict):
    """Linux capabilities."""

    drop: list[Literal["ALL"]]


class ContainerSecurity(TypedDict):
    """Security context of a container."""

    allowPrivilegeEscalation: Literal[False]
    capabilities: Capabilities


class Seccomp(TypedDict):
    """Which system calls are allowed."""

    type: Literal["RuntimeDefault"]


class PodSecurity(TypedDict):
    """Security context of a pod."""

    runAsNonRoot: Literal[True]
    runAsUser: Positive
    runAsGroup: Positive
    fsGroup: Positive
    fsGroupChangePolicy: Literal["OnRootMismatch"]
    seccompProfile: Seccomp


class VolumeMount(TypedDict):
    """Where a container sees a volume."""

    name: ShortName
    mountPath: Annotated[str, Pattern(r"/.+")]
    readOnly: NotRequired[bool]


class EmptyDir(TypedDict):
    """A scratch volume."""

    medium: NotRequired[Literal["Memory"]]
    sizeLimit: NotRequired[Quantity]


class Claim(TypedDict):
    """A PersistentVolumeClaim."""

    claimName: Name


class Volume(TypedDict):
    """One volume of one of these kinds."""

    name: ShortName
    emptyDir: NotRequired[EmptyDir]
    configMap: NotRequired[NameRef]
    persistentVolumeClaim: NotRequired[Claim]


class ContainerPort(TypedDict):
    """A port that a container listens on."""

    name: Annotated[str, Pattern(r"[a-z0-9]([a-z0-9-]{0,13}[a-z0-9])?")]
    containerPort: Port


class Exec(TypedDict):
    """A command inside the container."""

    command: list[str]


class Hook(TypedDict):
    """What runs at a point of a container's life."""

    exec: Exec


class Lifecycle(TypedDict):
    """Hooks of a container."""

    preStop: Hook


class Container(TypedDict):
    """A container. No probes: KubeRay's own know when Ray is healthy."""

    name: ShortName
    image: PinnedImage
    imagePullPolicy: NotRequired[Literal["Always", "IfNotPresent", "Never"]]
    env: NotRequired[list[Env]]
    envFrom: NotRequired[list[EnvFrom]]
    ports: NotRequired[list[ContainerPort]]
    lifecycle: NotRequired[Lifecycle]
    resources: Resources
    securityContext: ContainerSecurity
    volumeMounts: NotRequired[list[VolumeMount]]


class Toleration(TypedDict):
    """A taint that the pod may be placed on."""

    key: LabelKey
    operator: Literal["Exists", "Equal"]
    value: NotRequired[LabelValue]
    effect: NotRequired[Literal["NoSchedule", "NoExecute", "PreferNoSchedule"]]


class Expression(TypedDict):
    """A condition on a label."""

    key: LabelKey
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: NotRequired[list[LabelValue]]


class NodeTerm(TypedDict):
    """Conditions that one node meets all."""

    matchExpressions: list[Expression]


class NodeTerms(TypedDict):
    """Terms of which one must be met."""

    nodeSelectorTerms: list[NodeTerm]


class NodeAffinity(TypedDict):
    """Which nodes a pod may be on."""

    requiredDuringSchedulingIgnoredDuringExecution: NodeTerms


class Selector(TypedDict):
    """Which pods (or namespaces) are meant; an empty one means all."""

    matchLabels: NotRequired[Labels]
    matchExpressions: NotRequired[list[Expression]]


class PodTerm(TypedDict):
    """Pods to stay away from, on one node."""

    labelSelector: Selector
    topologyKey: Literal["kubernetes.io/hostname"]


class PodAntiAffinity(TypedDict):
    """Which pods a pod may not share a node with."""

    requiredDuringSchedulingIgnoredDuringExecution: list[PodTerm]


class Affinity(TypedDict):
    """Where a pod may be placed."""

    nodeAffinity: NotRequired[NodeAffinity]
    podAntiAffinity: NotRequired[PodAntiAffinity]


class PodSpec(TypedDict):
    """A pod."""

    restartPolicy: Literal["Never"]
    terminationGracePeriodSeconds: Positive
    priorityClassName: NotRequired[Name]
    serviceAccountName: NotRequired[Name]
    automountServiceAccountToken: NotRequired[bool]
    imagePullSecrets: NotRequired[list[NameRef]]
    securityContext: PodSecurity
    affinity: NotRequired[Affinity]
    nodeSelector: NotRequired[Labels]
    tolerations: NotRequired[list[Toleration]]
    containers: list[Container]
    volumes: NotRequired[list[Volume]]


class PodTemplate(TypedDict):
    """A pod to be made."""

    metadata: PodMetadata
    spec: PodSpec


# ---- RayJob

StartParams = TypedDict("StartParams", {"num-cpus": str, "num-gpus": str, "object-store-memory": str})
"""Of `ray start`. Labels and other resources have fields of their own."""


class HeadGroup(TypedDict):
    """The head."""

    serviceType: Literal["ClusterIP"]
    labels: NotRequired[Labels]
    rayStartParams: StartParams
    template: PodTemplate


class WorkerGroup(TypedDict):
    """Workers of one kind."""

    groupName: ShortName
    replicas: Count
    minReplicas: Count
    maxReplicas: Count
    priority: NotRequired[Annotated[int, Range(-(2**31), 2**31 - 1)]]
    idleTimeoutSeconds: NotRequired[Count]
    labels: NotRequired[Labels]
    rayStartParams: StartParams
    template: PodTemplate


class AutoscalerOptions(TypedDict):
    """Of the autoscaler beside the head."""

    version: Literal["v1", "v2"]
    upscalingMode: Literal["Default", "Aggressive", "Conservative"]
    idleTimeoutSeconds: Count
    resources: Resources
    securityContext: ContainerSecurity
    args: NotRequired[list[str]]


class AuthOptions(TypedDict):
    """Who may talk to Ray."""

    mode: Literal["token"]
    secretName: NotRequired[Name]


class RayCluster(TypedDict):
    """The cluster that a RayJob makes for each attempt."""

    rayVersion: Annotated[str, Pattern(r"\d+\.\d+\.\d+")]
    authOptions: AuthOptions
    enableInTreeAutoscaling: bool
    autoscalerOptions: NotRequired[AutoscalerOptions]
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class SubmitterConfig(TypedDict):
    """Of the pod that submits the job to the head."""

    backoffLimit: Count


class RayJobSpec(TypedDict):
    """A job and its cluster."""

    entrypoint: str
    submissionMode: Literal["K8sJobMode"]
    submitterConfig: SubmitterConfig
    submitterPodTemplate: PodTemplate
    backoffLimit: Count
    preRunningDeadlineSeconds: Positive
    activeDeadlineSeconds: Positive
    suspend: NotRequired[bool]
    shutdownAfterJobFinishes: Literal[True]
    """No deletionRules: none applies to a job that was stopped, and its cluster would be paid for on and on."""
    ttlSecondsAfterFinished: Count
    rayClusterSpec: RayCluster


class JobMetadata(TypedDict):
    """Of a RayJob."""

    name: JobName
    namespace: NotRequired[ShortName]
    labels: NotRequired[Labels]
    annotations: NotRequired[dict[LabelKey, str]]


class RayJob(TypedDict):
    """KubeRay's job."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: JobMetadata
    spec: RayJobSpec


# ---- what stands beside it


class ConfigMap(TypedDict):
    """Files for pods."""

    apiVersion: Literal["v1"]
    kind: Literal["ConfigMap"]
    metadata: Metadata
    data: dict[str, str]


class PriorityClass(TypedDict):
    """Who goes first when nodes are short. `globalDefault: false` is the default, and the server drops it."""

    apiVersion: Literal["scheduling.k8s.io/v1"]
    kind: Literal["PriorityClass"]
    metadata: Metadata
    value: Count
    preemptionPolicy: Literal["Never", "PreemptLowerPriority"]
    description: str


class DisruptionBudgetSpec(TypedDict):
    """How many pods must stay. Only a number works for pods that no Deployment owns."""

    minAvailable: Positive
    selector: Selector


class DisruptionBudget(TypedDict):
    """Keeps node drains away from pods."""

    apiVersion: Literal["policy/v1"]
    kind: Literal["PodDisruptionBudget"]
    metadata: Metadata
    spec: DisruptionBudgetSpec


class Peer(TypedDict):
    """Who may connect."""

    podSelector: NotRequired[Selector]
    namespaceSelector: NotRequired[Selector]


class PolicyPort(TypedDict):
    """Where to."""

    port: Port
    protocol: Literal["TCP"]


IngressRule = TypedDict("IngressRule", {"from": list[Peer], "ports": NotRequired[list[PolicyPort]]})


class NetworkPolicySpec(TypedDict):
    """What may come in."""

    podSelector: Selector
    policyTypes: list[Literal["Ingress"]]
    ingress: list[IngressRule]


class NetworkPolicy(TypedDict):
    """A wall around pods."""

    apiVersion: Literal["networking.k8s.io/v1"]
    kind: Literal["NetworkPolicy"]
    metadata: Metadata
    spec: NetworkPolicySpec


class MetricsEndpoint(TypedDict):
    """A port with metrics, by its name."""

    port: Literal["metrics"]


class PodMonitorSpec(TypedDict):
    """What Prometheus reads."""

    selector: Selector
    podMetricsEndpoints: list[MetricsEndpoint]


class PodMonitor(TypedDict):
    """Of the Prometheus operator."""

    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PodMonitor"]
    metadata: Metadata
    spec: PodMonitorSpec


KINDS: dict[str, type] = {
    "RayJob": RayJob,
    "ConfigMap": ConfigMap,
    "PriorityClass": PriorityClass,
    "PodDisruptionBudget": DisruptionBudget,
    "NetworkPolicy": NetworkPolicy,
    "PodMonitor": PodMonitor,
}
"""The type of each `kind`."""
