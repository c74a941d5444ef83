#include "layer.h"

/* The innermost scope that this thread is in.  Scopes live on the C stack of
 * the calls that entered them. */
static _Thread_local peftc_scope *innermost;

pc_activation *peftc_scope_enter(peftc_scope *scope, PyObject *registry)
{
    scope->outer = innermost;
    scope->registry = registry;
    scope->activation = NULL;
    scope->owns = false;
    if (registry != NULL) {
        for (const peftc_scope *s = innermost; s != NULL; s = s->outer) {
            if (s->registry == registry) {
                scope->activation = s->activation;
                break;
            }
        }
        if (scope->activation == NULL) {
            scope->activation = pc_registry_acquire(peftc_registry_core(registry));
            scope->owns = true;
        }
    }
    innermost = scope;
    return scope->activation;
}

void peftc_scope_leave(peftc_scope *scope)
{
    innermost = scope->outer;
    if (scope->owns)
        pc_activation_release(scope->activation);
}
