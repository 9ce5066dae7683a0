"""Attribution: taps, modifiers and reducers around one forward and one backward."""

from tdcache.attribution.deeplift import DeepLift
from tdcache.attribution.gradients import GradCAM, GradientXActivation, GuidedBackpropagation, InputXGradient, Saliency
from tdcache.attribution.influence import Conductance, InternalInfluence
from tdcache.attribution.integrated import IntegratedGradients
from tdcache.attribution.modifiers import GradDrop, GuidedReLU, ScaleGradient, StopGradient
from tdcache.attribution.smoothgrad import SmoothGrad
