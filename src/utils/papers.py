"""Figures printed in the papers, in %, which our tables show next to our own."""

# Pei et al. 2022 (arXiv:2205.10617), README of the authors' repository: network -> vanilla, GCM;
# for each, top-1 accuracy, then attack robustness under the attacks of GCM_COLUMNS
GCM_COLUMNS = ("fgsm", "pgd_l1", "pgd_l2", "pgd_linf", "cw_pgd_l2")
GCM_RADII = {"linf": 8 / 255, "l2": 8, "l1": 1600}  # RobustART's, at 224 pixels
GCM_LAYER = (1e20, 1e-8)  # w, epsilon
GCM_TABLE = {
    "resnet50": ((77.89, 31.77, 0.01, 0.01, 0.00, 0.21),
                 (78.57, 95.18, 94.82, 94.41, 97.38, 95.11)),
    "wide_resnet50_2": ((78.21, 20.88, 0.36, 0.61, 0.50, 0.21),
                        (78.08, 96.06, 94.46, 94.51, 97.69, 95.66)),
    "densenet121": ((74.86, 16.82, 0.04, 0.05, 0.06, 0.12),
                    (74.71, 94.98, 94.31, 94.08, 97.16, 95.49)),
    "efficientnet_b4": ((71.52, 1.23, 0.36, 0.28, 0.20, 1.88),
                        (71.76, 94.68, 89.95, 90.87, 97.97, 93.07)),
    "vit_b_16": ((79.46, 15.86, 0.00, 0.00, 0.00, 0.90),
                 (79.47, 92.24, 94.94, 95.07, 98.24, 93.31)),
    "swin_s": ((82.93, 16.93, 0.20, 0.00, 0.00, 0.76), (82.79, 94.38, 90.71, 91.04, 98.77, 92.31)),
}

# Shafahi et al. 2019 (arXiv:1904.12843), Table 1: CIFAR-10, WRN-32-10, Linf 8/255; training ->
# clean accuracy, accuracy under PGD-20 with 10 restarts, minutes of training
FREE_TABLE = {
    "natural": (95.01, 0.00, 780), "free2": (91.45, 33.41, 816), "free4": (87.83, 40.73, 800),
    "free8": (85.96, 46.33, 785), "free10": (83.94, 45.94, 785), "pgd": (87.25, 45.53, 5418)}
