/* Opening an adapter_model.bin: what the files that do it share.
 *
 *   torch_bin.c      which layout it is, the storages, and the object that the caller gets
 *   torch_zip.c      the zip archive of torch ≥ 1.6
 *   torch_legacy.c   the stream of pickles of torch before that
 *   torch_names.c    from the object in the pickle to a list of named tensors
 *
 * (torch_storage.c reads the tensors of what is open.)
 */
#ifndef PEFTC_FORMATS_TORCH_LOADER_H
#define PEFTC_FORMATS_TORCH_LOADER_H

#include "../core/strmap.h"
#include "pickle_reader.h"
#include "torch_storage.h"

/* What exists only while a file is being opened. */
typedef struct pc_bin_loader {
    pc_torch_bin *bin;
    uint32_t *storage_of_entry; /* zip entry → storage, or UINT32_MAX */
    pc_strmap storage_of_key;   /* legacy; the keys are in the bin's pool */
    pc_pickle_input input;
    pc_pickle pickle; /* that describes the tensors */
} pc_bin_loader;

/* PC_ERR_UNPICKLE "LABEL WHY". */
pc_status pc_bin_wrong(const pc_torch_bin *bin, pc_error *err, const char *why);
pc_status pc_bin_add_storage(pc_torch_bin *bin, const pc_bin_storage *storage, uint32_t *index, pc_error *err);
/* A storage that is named again must be described as before. */
pc_status pc_bin_check_again(const pc_torch_bin *bin, const pc_pickle *pickle, uint32_t index,
                             const pc_pickle_storage *request, pc_error *err);

/* Run the file's pickles, find its storages and name its tensors. */
pc_status pc_bin_open_zip(pc_bin_loader *load, pc_error *err);
pc_status pc_bin_open_legacy(pc_bin_loader *load, pc_error *err);

/* The tensors of the pickle's object `top`, a (nested) dict: named, checked and described in load->bin. */
pc_status pc_bin_name_tensors(pc_bin_loader *load, pc_pickle_ref top, pc_error *err);

#endif
