"""What an image is compared by: PSNR, SSIM, LPIPS, tOF, VMAF, and pictures side by side."""
