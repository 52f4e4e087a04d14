// A file of its own, because its macro changes with every file of csrc/.
namespace fedkern {

const char* source_hash() { return FEDKERN_SOURCE_HASH; }

}  // namespace fedkern
